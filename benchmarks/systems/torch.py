"""PyTorch: modules, an eager loop with a fused optimizer ("torch"), and the same under `torch.compile`.

It runs on the GPU if there is one. A race in bfloat16 runs under `torch.autocast`, as its documentation says.
"""

import contextlib
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.job import Loop, reader

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(work, model, optimizer):
    model.to(DEVICE).train()  # in place: the optimizer has the same parameters
    compiled = torch.compile if work.system == "torch-compile" else lambda function: function
    mixed = work.config.get("compute") == "bfloat16"
    precision = functools.partial(torch.autocast, DEVICE.type, torch.bfloat16) if mixed else contextlib.nullcontext
    forward = model if DEVICE.type == "cuda" else compiled(model)

    def cost(x, y):
        with precision():
            logits = forward(x)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), y.view(-1))

    if DEVICE.type == "cuda":  # where passes over the logits are worth fusing with the model
        cost = compiled(cost)

    def step(x, y):
        optimizer.zero_grad()
        loss = cost(x, y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def tensor(x):
        x = torch.from_numpy(np.array(x))
        if x.ndim == 4:
            x = x.permute(0, 3, 1, 2)  # this view is channels last, which is the fast layout on a CPU
        return (x.long() if x.dtype == torch.int32 else x).to(DEVICE)

    return Loop(step, [tuple(map(tensor, pair)) for pair in work.pairs()], wait)


def wait(loss):
    if loss.is_cuda:
        torch.cuda.synchronize()


def adam(work, model):
    return torch.optim.Adam(model.parameters(), work.config["rate"], fused=True)


def put(parameter, value):
    assert parameter.shape == value.shape, (parameter.shape, value.shape)
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.ascontiguousarray(value)))


def linear(weights):
    """A `Linear` from a kernel of shape `(inputs, outputs)`."""
    layer = nn.Linear(*weights["kernel"].shape, bias="bias" in weights)
    put(layer.weight, weights["kernel"].T)
    if "bias" in weights:
        put(layer.bias, weights["bias"])
    return layer


def affine(layer, weights):
    put(layer.weight, weights["scale"])
    put(layer.bias, weights["bias"])
    return layer


def mlp(work):
    model = nn.Sequential(linear(work.weights["hidden"]), nn.ReLU(), linear(work.weights["out"]))
    return train(work, model, adam(work, model))


def convolve(weights, stride=1):
    kernel = weights["kernel"].transpose(3, 2, 0, 1)
    outputs, inputs, size, _ = kernel.shape
    layer = nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False)
    put(layer.weight, kernel)
    return layer


def batch_norm(weights):
    return affine(nn.BatchNorm2d(len(weights["scale"]), eps=1e-5, momentum=0.1), weights)


class Residual(nn.Module):
    def __init__(self, p):
        super().__init__()
        stride = 2 if "project" in p else 1
        self.conv1, self.norm1 = convolve(p["conv1"], stride), batch_norm(p["norm1"])
        self.conv2, self.norm2 = convolve(p["conv2"]), batch_norm(p["norm2"])
        self.short = nn.Identity()
        if stride == 2:
            self.short = nn.Sequential(convolve(p["project"], 2), batch_norm(p["project_norm"]))

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.short(x) + h)


class ResNet(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.stem = nn.Sequential(convolve(p["stem"]), batch_norm(p["stem_norm"]), nn.ReLU())
        self.blocks = nn.Sequential(*(Residual(block) for block in p["blocks"].values()))
        self.head = linear(p["head"])

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def conv(work):
    model = ResNet(work.weights).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), work.config["rate"], momentum=0.9, fused=True)
    return train(work, model, optimizer)


class Block(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        at = {name: value["kernel"] for name, value in p["attention"].items()}
        width, self.heads = len(at["query"]), heads
        joined = np.concatenate([at[name].reshape(width, width) for name in ("query", "key", "value")], 1)
        self.qkv, self.out = linear({"kernel": joined}), linear({"kernel": at["out"].reshape(width, width)})
        self.norm1 = affine(nn.LayerNorm(width, eps=1e-6), p["norm1"])
        self.norm2 = affine(nn.LayerNorm(width, eps=1e-6), p["norm2"])
        self.mlp = nn.Sequential(linear(p["up"]), nn.GELU("tanh"), linear(p["down"]))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (a.view(b, t, self.heads, -1).transpose(1, 2) for a in self.qkv(self.norm1(x)).chunk(3, -1))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, p, heads):
        super().__init__()
        self.embed = nn.Embedding(*p["embed"]["table"].shape)
        self.positions = nn.Parameter(torch.empty(p["positions"]["table"].shape))
        put(self.embed.weight, p["embed"]["table"])
        put(self.positions, p["positions"]["table"])
        self.blocks = nn.Sequential(*(Block(block, heads) for block in p["blocks"].values()))
        self.norm = affine(nn.LayerNorm(len(p["norm"]["scale"]), eps=1e-6), p["norm"])
        self.head = linear(p["head"])

    def forward(self, tokens):
        return self.head(self.norm(self.blocks(self.embed(tokens) + self.positions)))


def gpt(work):
    model = GPT(work.weights, work.config["heads"])
    return train(work, model, adam(work, model))


def reading(work):
    from benchmarks.systems.grain import Images

    def for_ever():
        data = Images(work.directory / "images")
        loader = torch.utils.data.DataLoader(data, batch_size=32)
        while True:
            yield from loader

    return reader(for_ever())
