"""Sealed JSON: what was written is read, and what was changed is noticed, whatever the keys are."""

import json

import jax
import numpy as np
import optax
import pytest

from sapwood.saving.checkpoints import Checkpoints
from sapwood.saving.checksummed_json import seal, unseal
from sapwood.train import Trainer, supervised


@pytest.mark.parametrize(
    "content",
    [
        {"memory": {epoch: epoch**2 for epoch in range(12)}},  # as numbers 2 < 10, as text "10" < "2"
        {1.5: 1, 10.5: 2, None: 3, True: 4, "a": (5, float("inf"))},
    ],
)
def test_what_is_read_is_what_json_makes_of_it(content):
    assert unseal(seal(content)) == json.loads(json.dumps(content))


def test_what_an_earlier_version_sealed_is_read():
    mark = "768a58f5e321e4788591a75093787cde7d747b78f8820b91d71cc824bd9e3c02"
    text = f'{{"sapwood": "0.1.0", "sha256": "{mark}", "content": {{"b": [1, 2.5], "a": {{"10": NaN, "9": "é"}}}}}}'
    content = unseal(text)
    assert content["b"] == [1, 2.5]
    with pytest.raises(ValueError, match="reads back other"):
        unseal(text.replace("2.5", "2.6"))


@pytest.mark.parametrize("content", [{"x": object()}, {(1, 2): 3}])
def test_what_json_does_not_hold(content):
    with pytest.raises(TypeError):
        seal(content)


def test_a_callback_that_remembers_by_epoch_can_be_resumed(tmp_path):
    def remember(event, memory):
        memory[event.epoch] = event.step

    data = {"x": np.eye(4, dtype="float32"), "label": np.arange(4)}
    model = lambda v, x: x @ v.param("w", (4, 4), jax.nn.initializers.zeros)  # noqa: E731
    trainer = Trainer(supervised(model, inputs="x"), optax.sgd(1.0))
    how = {"batch_size": 2, "run": tmp_path, "keep": 2, "callbacks": [remember], "progress": False}
    trainer.fit(data, epochs=11, **how)
    assert Checkpoints(tmp_path / "checkpoints").info(22).info["callbacks"][0]["11"] == 22
    state, _ = trainer.fit(data, epochs=12, resume=True, **how)
    assert int(state.step) == 24
