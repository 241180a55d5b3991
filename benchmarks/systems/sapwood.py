"""Sapwood: `Trainer.fit` as users call it ("sapwood"), and its bare step in a loop of one's own ("sapwood-step")."""

import time

import jax
import optax

import sapwood as sw
from benchmarks.job import jax_loop
from sapwood import layers as L

ENDLESS = 10**9


class Fit:
    """The job of a `Trainer`: rounds are rows of `fit`, timed from a callback, which also waits for the next go.

    A row closes every round, so a round holds everything `fit` does for its steps: reading batches, the loop, default
    checks and metrics, the logs of a run directory. Checkpoints have a race of their own and are put off here.
    """

    def __init__(self, work, trainer, state, data=None):
        self.work, self.trainer, self.state = work, trainer, state
        self.data = sw.data.load(work.data) if data is None else data

    def losses(self, steps):
        _, history = self.trainer.fit(
            self.data, steps=steps, batch_size=self.work.suite.batch_size, state=self.state, log_every=1
        )
        return [row["loss"] for row in history]

    def rounds(self, channel, steps):
        channel.wait()
        begin = time.perf_counter()

        def round_done(event, memory):
            nonlocal begin
            channel.report(seconds={"step": (time.perf_counter() - begin) / steps})
            channel.wait()
            begin = time.perf_counter()

        self.trainer.fit(
            self.data, steps=ENDLESS, batch_size=self.work.suite.batch_size, state=self.state, log_every=steps,
            checkpoint_every=ENDLESS, callbacks=[round_done], run=self.work.directory / self.work.system,
        )  # fmt: skip


def train(work, objective, optimizer, params):
    """The job of an objective that starts from these parameters."""
    trainer = sw.Trainer(objective, optimizer)
    names = list(work.data)
    batches = [dict(zip(names, pair, strict=True)) for pair in work.pairs()]
    state = trainer.init(0, batches[0])
    same = jax.tree.structure(state.params) == jax.tree.structure(params)
    assert same, f"the model declares {jax.tree.structure(state.params)}, not {jax.tree.structure(params)}"
    state = state.replace(params=jax.device_put(params))
    if work.system == "sapwood":
        return Fit(work, trainer, state)
    step = jax.jit(trainer.step, donate_argnums=0)

    def bare(state, batch):
        state, metrics = step(state, batch)
        return state, metrics["loss"]

    loop = jax_loop(bare, state, [(batch,) for batch in batches])
    update = loop.step
    loop.losses = lambda steps: [float(sw.train.metrics.compute({"loss": update(*b)})["loss"]) for b in
                                 loop.batches[:steps]]  # fmt: skip
    return loop


def mlp(work):
    def model(v, image):
        return L.Dense(10)(v.out, jax.nn.relu(L.Dense(128)(v.hidden, image)))

    return train(work, sw.supervised(model), optax.adam(work.config["rate"]), work.weights)
