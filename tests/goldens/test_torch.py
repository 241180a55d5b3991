"""Array functions and losses against what PyTorch gave for the same inputs: values and gradients.

CI reads the numbers from `torch.npz`; `pytest -m long tests/goldens` asks PyTorch itself whether it still gives them.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapwood import layers as L
from sapwood import losses

spec = importlib.util.spec_from_file_location("torch_oracle", Path(__file__).with_name("torch_oracle.py"))
assert spec is not None
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)


def batch_norm(x, scale, bias):
    return L.batch_norm(x, *L.moments(x, (0, 1)), scale, bias, eps=1e-3)


OURS = {
    "conv_1d_dilated": lambda x, kernel, bias: L.conv(x, kernel, bias, padding="VALID", dilation=2),
    "conv_2d_strided_grouped_padded": lambda x, kernel, bias: L.conv(x, kernel, bias, (2, 1), (1, 2), groups=2),
    "conv_2d_depthwise": lambda x, kernel: L.conv(x, kernel, groups=3),
    "conv_3d": lambda x, kernel, bias: L.conv(x, kernel, bias, padding="VALID"),
    "max_pool_padded": lambda x: L.max_pool(x, (3, 2), 2, 1),
    "avg_pool_counts_padding": lambda x: L.avg_pool(x, (3, 2), (2, 1), 1, count_padding=True),
    "avg_pool_leaves_padding_out": lambda x: L.avg_pool(x, (3, 2), (2, 1), 1),
    "layer_norm": lambda x, scale, bias: L.layer_norm(x, scale, bias, eps=1e-3),
    "rms_norm": lambda x, scale: L.rms_norm(x, scale, eps=1e-3),
    "group_norm": lambda x, scale, bias: L.group_norm(x, 3, scale, bias, eps=1e-3),
    "batch_norm_of_a_batch": batch_norm,
    "attention_causal_grouped": lambda q, k, v: L.attention(q, k, v, causal=True),
    "attention_masked_cross": lambda q, k, v, mask: L.attention(q, k, v, mask, scale=0.3),
    "softmax_cross_entropy_smoothed": lambda logits, target: losses.softmax_cross_entropy(logits, target, 0.1),
    "softmax_cross_entropy_of_probabilities": losses.softmax_cross_entropy,
    "sigmoid_cross_entropy": losses.sigmoid_cross_entropy,
    "huber": lambda outputs, target: losses.huber(outputs, target, 0.7),
    "kl_divergence": lambda logits, target: losses.kl_divergence(jax.nn.log_softmax(logits), target),
    "embed": lambda table, ids: L.embed(ids, table),
}


def compare(case: str, golden: dict[str, np.ndarray]) -> None:
    """The values and each gradient of a case, to 1e-5 of the largest entry."""
    given = {name.rsplit("/", 1)[1]: x for name, x in golden.items() if name.startswith(f"{case}/in/")}
    floating = {name: given[name] for name in oracle.CASES[case]}
    others = {name: x for name, x in given.items() if name not in floating}

    def weighted(floating):
        y = OURS[case](**floating, **others)
        return jnp.sum(y * oracle.weighting(y)), y

    gradients, y = jax.device_get(jax.jit(jax.grad(weighted, has_aux=True))(floating))
    found = {f"{case}/out": y} | {f"{case}/gradient/{name}": x for name, x in gradients.items()}
    assert found.keys() == {name for name in golden if name.startswith(f"{case}/") and "/in/" not in name}
    for name, x in found.items():
        assert x.shape == golden[name].shape, name
        scale = np.abs(golden[name]).max()
        assert scale > 0, f"{name} says nothing"
        np.testing.assert_allclose(x / scale, golden[name] / scale, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def goldens() -> dict[str, np.ndarray]:
    return dict(np.load(oracle.FILE))


def test_the_file_holds_all_cases_and_who_made_it(goldens):
    assert {name.partition("/")[0] for name in goldens} == {"versions", *oracle.CASES}
    assert OURS.keys() == oracle.CASES.keys()
    assert set(json.loads(str(goldens["versions"]))) == {"torch", "numpy", "python"}


@pytest.mark.parametrize("case", oracle.CASES)
def test_it_is_as_pytorch_has_it(case, goldens):
    compare(case, goldens)


def test_a_number_that_is_off_is_seen(goldens):
    for part in ("out", "gradient/x", "in/scale"):
        name = f"layer_norm/{part}"
        with pytest.raises(AssertionError, match="layer_norm"):
            compare("layer_norm", goldens | {name: goldens[name] * 1.0001})


@pytest.mark.long
@pytest.mark.parametrize("case", oracle.CASES)
def test_pytorch_still_gives_these_numbers(case, goldens):
    pytest.importorskip("torch", reason='pip install "sapwood[oracles]"')
    for name, x in oracle.compute(case).items():
        np.testing.assert_allclose(x, goldens[name], rtol=1e-9, atol=1e-12, err_msg=name)
