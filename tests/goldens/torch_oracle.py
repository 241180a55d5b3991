"""What PyTorch gives for the cases of `test_torch.py`: outputs and gradients in float64.

    pip install ".[oracles]" && python tests/goldens/torch_oracle.py     # writes torch.npz beside this file

The file holds the inputs too, and the versions that made it, so CI needs no PyTorch. A case's inputs are drawn from its
name. Arrays are laid out as Sapwood's (channels last); the case turns them into PyTorch's layout and back.
"""

import json
import platform
import sys
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("torch.npz")

CONV = {"x": (2, 7, 6, 4), "kernel": (3, 2, 2, 6), "bias": (6,)}
CASES: dict[str, dict[str, tuple[int, ...]]] = {
    "conv_1d_dilated": {"x": (2, 9, 3), "kernel": (3, 3, 4), "bias": (4,)},
    "conv_2d_strided_grouped_padded": CONV,
    "conv_2d_depthwise": {"x": (1, 5, 5, 3), "kernel": (3, 3, 1, 6)},
    "conv_3d": {"x": (1, 4, 5, 3, 2), "kernel": (2, 3, 2, 2, 3), "bias": (3,)},
    "max_pool_padded": {"x": (2, 7, 6, 3)},
    "avg_pool_counts_padding": {"x": (2, 7, 6, 3)},
    "avg_pool_leaves_padding_out": {"x": (2, 7, 6, 3)},
    "layer_norm": {"x": (3, 4, 5), "scale": (5,), "bias": (5,)},
    "rms_norm": {"x": (3, 4, 5), "scale": (5,)},
    "group_norm": {"x": (2, 3, 4, 6), "scale": (6,), "bias": (6,)},
    "batch_norm_of_a_batch": {"x": (4, 3, 5), "scale": (5,), "bias": (5,)},
    "attention_causal_grouped": {"q": (2, 5, 4, 3), "k": (2, 5, 2, 3), "v": (2, 5, 2, 3)},
    "attention_masked_cross": {"q": (2, 3, 2, 4), "k": (2, 6, 2, 4), "v": (2, 6, 2, 4)},
    "softmax_cross_entropy_smoothed": {"logits": (4, 5)},
    "softmax_cross_entropy_of_probabilities": {"logits": (4, 5)},
    "sigmoid_cross_entropy": {"logits": (4, 5)},
    "huber": {"outputs": (4, 5)},
    "kl_divergence": {"logits": (4, 5)},
    "embed": {"table": (7, 3)},
}
"""The floating inputs of each case: their gradients are compared, too."""


def fixed(case: str) -> dict[str, np.ndarray]:
    """What has no gradient: labels, masks, targets."""
    draw = np.random.default_rng(1)
    match case:
        case "attention_masked_cross":
            mask = draw.random((2, 1, 3, 6)) < 0.6
            return {"mask": mask | (np.arange(6) == 2)}  # each query may look somewhere
        case "softmax_cross_entropy_smoothed":
            return {"target": draw.integers(5, size=4, dtype="int32")}
        case "softmax_cross_entropy_of_probabilities" | "kl_divergence":
            return {"target": draw.dirichlet(np.ones(5), 4).astype("float32")}
        case "sigmoid_cross_entropy" | "huber":
            return {"target": draw.random((4, 5), "float32")}
        case "embed":
            return {"ids": draw.integers(7, size=(2, 4), dtype="int32")}
    return {}


def inputs(case: str) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(sum(map(ord, case)))
    return {name: draw.normal(size=shape).astype("float32") for name, shape in CASES[case].items()}


def weighting(y):
    """Uneven numbers, so that every output has its own part in the gradient."""
    return np.cos(np.arange(y.size)).reshape(y.shape)


def first(x):
    """The channels second, as PyTorch has them."""
    return x.movedim(-1, 1)


def last(x):
    return x.movedim(1, -1)


def taps(kernel):
    """`(*window, channels, out)` as `(out, channels, *window)`."""
    return kernel.movedim((-1, -2), (0, 1))


def heads(x):
    """`(batch, length, heads, head_dim)` as `(batch, heads, length, head_dim)`, and back."""
    return x.transpose(1, 2)


def outputs(torch, case: str, a: dict):
    """A case's result in PyTorch, of float64 tensors."""
    f = torch.nn.functional
    match case:
        case "conv_1d_dilated":
            return last(f.conv1d(first(a["x"]), taps(a["kernel"]), a["bias"], dilation=2))
        case "conv_2d_strided_grouped_padded":
            return last(f.conv2d(first(a["x"]), taps(a["kernel"]), a["bias"], (2, 1), (1, 2), groups=2))
        case "conv_2d_depthwise":
            return last(f.conv2d(first(a["x"]), taps(a["kernel"]), padding=1, groups=3))
        case "conv_3d":
            return last(f.conv3d(first(a["x"]), taps(a["kernel"]), a["bias"]))
        case "max_pool_padded":
            return last(f.max_pool2d(first(a["x"]), (3, 2), (2, 2), (1, 1)))
        case "avg_pool_counts_padding" | "avg_pool_leaves_padding_out":
            counts = case == "avg_pool_counts_padding"
            return last(f.avg_pool2d(first(a["x"]), (3, 2), (2, 1), (1, 1), count_include_pad=counts))
        case "layer_norm":
            return f.layer_norm(a["x"], (5,), a["scale"], a["bias"], eps=1e-3)
        case "rms_norm":
            return f.rms_norm(a["x"], (5,), a["scale"], eps=1e-3)
        case "group_norm":
            return last(f.group_norm(first(a["x"]), 3, a["scale"], a["bias"], eps=1e-3))
        case "batch_norm_of_a_batch":
            return last(f.batch_norm(first(a["x"]), None, None, a["scale"], a["bias"], training=True, eps=1e-3))
        case "attention_causal_grouped":
            q, k, v = (heads(a[name]) for name in "qkv")
            return heads(f.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        case "attention_masked_cross":
            q, k, v = (heads(a[name]) for name in "qkv")
            return heads(f.scaled_dot_product_attention(q, k, v, a["mask"], scale=0.3))
        case "softmax_cross_entropy_smoothed":
            return f.cross_entropy(a["logits"], a["target"].long(), reduction="none", label_smoothing=0.1)
        case "softmax_cross_entropy_of_probabilities":
            return f.cross_entropy(a["logits"], a["target"].double(), reduction="none")
        case "sigmoid_cross_entropy":
            return f.binary_cross_entropy_with_logits(a["logits"], a["target"].double(), reduction="none")
        case "huber":
            return f.huber_loss(a["outputs"], a["target"].double(), reduction="none", delta=0.7)
        case "kl_divergence":
            return f.kl_div(f.log_softmax(a["logits"], -1), a["target"].double(), reduction="none").sum(-1)
        case "embed":
            return f.embedding(a["ids"].long(), a["table"])
    raise KeyError(case)


def compute(case: str) -> dict[str, np.ndarray]:
    """Inputs, outputs and gradients of a case, by the names they have in the file."""
    import torch

    given, others = inputs(case), fixed(case)
    floating = {name: torch.tensor(x, dtype=torch.float64, requires_grad=True) for name, x in given.items()}
    y = outputs(torch, case, floating | {name: torch.tensor(x) for name, x in others.items()})
    (y * torch.tensor(weighting(y.detach().numpy()))).sum().backward()
    found = {f"{case}/in/{name}": x for name, x in (given | others).items()}
    found[f"{case}/out"] = y.detach().numpy()
    return found | {f"{case}/gradient/{name}": x.grad.numpy() for name, x in floating.items()}


def versions() -> dict[str, str]:
    import torch

    return {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}


def main() -> None:
    arrays = {name: x for case in CASES for name, x in compute(case).items()}
    np.savez_compressed(FILE, versions=np.array(json.dumps(versions())), **arrays)
    print(f"{FILE}: {len(CASES)} cases, {FILE.stat().st_size} bytes, {versions()}", file=sys.stderr)


if __name__ == "__main__":
    main()
