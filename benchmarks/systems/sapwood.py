"""Sapwood: `Trainer.fit` as users call it ("sapwood"), and its bare step in a hand-written loop ("sapwood-step")."""

import time

import jax
import numpy as np
import optax

import sapwood as sw
import sapwood.data.reader
from benchmarks.job import jax_loop, reader
from sapwood import layers as L
from sapwood.recipes.vision.digits import Digits
from sapwood.runtime import compile_options

ENDLESS = 10**9


class Fit:
    """The job of a `Trainer`. A round is a row of the logs of one long `fit`, timed by a callback, which then waits.

    A round ends with a row, so its time includes all that `fit` does: reading batches, the loop, default checks and
    metrics, and the logs of a run directory. No checkpoints are written, since they have their own race.
    """

    def __init__(self, work, trainer, state, data=None):
        self.work, self.trainer, self.state = work, trainer, state
        self.data = sw.data.load(work.data) if data is None else data
        self.options = {}

    def losses(self, steps):
        _, history = self.trainer.fit(
            self.data, steps=steps, batch_size=self.work.suite.batch_size, state=self.state, log_every=1,
            **self.options,
        )  # fmt: skip
        return [row["loss"] for row in history]

    def rounds(self, channel, steps):
        channel.wait()
        done, begin = 0, time.perf_counter()

        def round_done(event, memory):
            nonlocal done, begin
            if event.step - done < steps:  # an epoch that ends within a round closes a row, too
                return
            channel.report(seconds={"step": (time.perf_counter() - begin) / (event.step - done)})
            channel.wait()
            done, begin = event.step, time.perf_counter()

        self.trainer.fit(
            self.data, steps=ENDLESS, batch_size=self.work.suite.batch_size, state=self.state, log_every=steps,
            checkpoint_every=ENDLESS, callbacks=[round_done], run=self.work.directory / self.work.system,
        )  # fmt: skip


def train(work, objective, optimizer, params):
    """The job of an objective, from the initial parameters ``params``."""
    trainer = sw.Trainer(objective, optimizer, policy=work.config.get("compute"))
    names = list(work.data)
    batches = [dict(zip(names, pair, strict=True)) for pair in work.pairs()]
    state = trainer.init(0, batches[0], params)
    if "step" not in work.system:
        return Fit(work, trainer, state)
    return steps(trainer, state, batches)


def steps(trainer, state, batches):
    """The job of the bare step, in a hand-written loop over batches on the device."""
    traced = jax.jit(trainer.step, donate_argnums=0).trace(state, batches[0])
    step = compile_options.compiled(traced, trainer.platform)

    def bare(state, batch):
        state, metrics = step(state, batch)
        return state, metrics["loss"]

    loop = jax_loop(bare, state, [(batch,) for batch in batches])
    loop.lower, loop.program = traced.lower, lambda: step
    loop.value = lambda loss: float(sw.train.metrics.compute({"loss": loss})["loss"])
    return loop


def mlp(work):
    def model(v, image):
        return L.Dense(10)(v.out, jax.nn.relu(L.Dense(128)(v.hidden, image)))

    return train(work, sw.supervised(model), optax.adam(work.config["rate"]), work.weights)


def conv(work):
    def convolve(v, x, features, size=3, stride=1):
        return L.Conv(features, (size, size), stride, size // 2, bias=False)(v, x)

    def model(v, x):
        x = jax.nn.relu(L.BatchNorm()(v.stem_norm, convolve(v.stem, x, work.config["stages"][0])))
        for i in range(len(work.config["stages"]) * work.config["blocks"]):
            block, features = v.blocks[i], work.config["stages"][i // work.config["blocks"]]
            stride = 1 if features == x.shape[-1] else 2
            h = jax.nn.relu(L.BatchNorm()(block.norm1, convolve(block.conv1, x, features, stride=stride)))
            h = L.BatchNorm()(block.norm2, convolve(block.conv2, h, features))
            if stride == 2:
                x = L.BatchNorm()(block.project_norm, convolve(block.project, x, features, 1, 2))
            x = jax.nn.relu(x + h)
        return L.Dense(work.config["classes"])(v.head, x.mean((1, 2)))

    return train(work, sw.supervised(model), optax.sgd(work.config["rate"], momentum=0.9), work.weights)


def gpt(work):
    c, norm = work.config, L.LayerNorm(eps=1e-6)

    def block(v, x):
        x = x + L.MultiHeadAttention(c["heads"], causal=True)(v.attention, norm(v.norm1, x))
        return x + L.Dense(c["width"])(v.down, jax.nn.gelu(L.Dense(4 * c["width"])(v.up, norm(v.norm2, x))))

    def model(v, tokens):
        x = L.Embed(c["vocabulary"], c["width"])(v.embed, tokens)
        x = L.LearnedPositions(c["tokens"])(v.positions, x)
        if scanned:
            x = L.Scan(block, c["layers"], remat=c.get("remat"))(v.blocks, x)
        else:
            for i in range(c["layers"]):
                x = block(v.blocks[i], x)
        return L.Dense(c["vocabulary"], bias=False)(v.head, norm(v.norm, x))

    scanned = "scan" in work.system
    params = work.weights
    if scanned:
        params = {**params, "blocks": sw.stack(params["blocks"])}
    objective = sw.supervised(model, inputs="tokens", target="targets")
    return train(work, objective, optax.adam(c["rate"]), params)


def digits(work):
    data = sw.data.load("digits", "train")
    return of_data(work, Digits().model, data.select(np.arange(4096) % len(data)))


def images(work):
    def model(v, x):
        for i, features in enumerate((16, 32, 64)):
            x = L.BatchNorm()(v.norms[i], L.Conv(features, (3, 3), bias=False)(v.convs[i], x))
            x = L.max_pool(jax.nn.relu(x), (2, 2))
        return L.Dense(10)(v.head, x.mean((1, 2)))

    return of_data(work, lambda v, x: model(v, x / 255), folder(work))


def of_data(work, model, data):
    """The job of `fit` on a data set; or of the bare step on the first ten batches, which stay on the device."""
    trainer = sw.Trainer(sw.supervised(model), optax.adam(1e-3))
    stream = sw.data.batches(data, work.suite.batch_size)
    batches = [stream[i] for i in range(10)]
    state = trainer.init(0, batches[0])
    return Fit(work, trainer, state, data) if "step" not in work.system else steps(trainer, state, batches)


def reading(work):
    return reader(sw.data.batches(folder(work), 32, shuffle=False))


def folder(work):
    """The folder of images. They are decoded in each pass, like a set too large for memory, unless "remembered"."""
    if "remembered" not in work.system:
        sapwood.data.reader.REMEMBER = 0
    return sw.data.load(work.directory / "images")
