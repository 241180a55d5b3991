"""`text`: a character-level decoder that learns to write like Moby-Dick, and then writes."""

from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import sapwood as sw
from sapwood.models import Decoder
from sapwood.train.objectives.next_token import next_token

NOVEL = Path(__file__).parent / "text" / "moby_dick.txt"

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "depth": 4, "width": 128, "heads": 4, "mlp": 0, "gated": False, "vocabulary_size": 0,
        "length": 128, "stride": 64, "batch_size": 16, "learning_rate": 2e-3, "policy": "float32", "remat": "none",
    },
    "1.7b": {  # 1,741,785,088 parameters; a step of 131,072 tokens
        "depth": 24, "width": 2048, "heads": 16, "mlp": 8192, "gated": True, "vocabulary_size": 32000,
        "length": 2048, "stride": 2048, "batch_size": 64, "learning_rate": 3e-4, "policy": "bfloat16", "remat": "full",
    },
}  # fmt: skip
"""What the fields of a recipe are that were left to its size."""


def _sized() -> Any:
    """A field that is None until `SIZES` says what it is."""
    return field(default=None, metadata={"default": "that of the size"})


@dataclass(frozen=True)
class Text(sw.Recipe):
    """A character-level transformer on a public-domain novel, sampled from when it is trained.

    ``size`` names a whole set of hyper-parameters; each of them given beside it wins. "1.7b" is the size of a language
    model for a TPU slice or several GPUs: SwiGLU, bfloat16, remat, and a vocabulary of 32,000 of which a text's
    characters use the first few. ``vocabulary_size=0`` is as many as the text has characters, ``mlp=0`` is 4 x width.
    ``experts=8`` makes each feed-forward part a mixture of 8 experts, 2 of them for a token.
    """

    size: Literal["small", "1.7b"] = "small"
    epochs: int = 1
    batch_size: int = _sized()
    policy: str = _sized()
    file: str | None = None
    length: int = _sized()
    stride: int = _sized()
    depth: int = _sized()
    width: int = _sized()
    heads: int = _sized()
    mlp: int = _sized()
    gated: bool = _sized()
    vocabulary_size: int = _sized()
    remat: Literal["none", "full", "minimal"] = _sized()
    experts: int = 0
    dropout: float = 0.0
    learning_rate: float = _sized()
    prompt: str = "Call me "
    sample: int = 300
    temperature: float = 0.8

    @cached_property
    def text(self):
        try:
            text = Path(self.file or NOVEL).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise sw.DataError(f"{self.file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
                               ) from None  # fmt: skip
        if not text:
            raise sw.DataError(f"{self.file} is empty; a text to learn from is expected")
        return text

    @cached_property
    def vocabulary(self):
        return "".join(sorted(set(self.text)))

    @cached_property
    def start(self):
        if not self.prompt:
            raise sw.ConfigError("prompt is empty; at least one character to write on from is expected")
        return sw.data.encode(self.prompt, self.vocabulary)

    def __post_init__(self):
        if self.size not in SIZES:
            raise sw.ConfigError(f"size is {self.size!r}; one of {', '.join(SIZES)} is expected")
        for name, value in SIZES[self.size].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not self.temperature > 0:  # NaN is not, either
            raise sw.ConfigError(f"temperature={self.temperature}: above 0 is expected; 0.1 is nearly greedy")
        if self.sample < 0:
            raise sw.ConfigError(f"sample={self.sample}: a number of characters to write is expected; 0 for none")
        if self.experts == 1:  # each token goes to two of them
            raise sw.ConfigError("experts=1: at least 2 are expected, or 0 for no mixture")
        if self.file is not None:  # so that the run can be read from any folder
            object.__setattr__(self, "file", str(Path(self.file).expanduser().absolute()))

    def data(self):
        len(self.start)  # a prompt that cannot be read is an error now, not after the training
        cut = int(0.9 * len(self.text))
        windows = partial(sw.data.characters, vocabulary=self.vocabulary)
        train = windows(self.text[:cut], self.length, stride=self.stride)
        return train, windows(self.text[cut:], self.length, stride=self.length)

    @cached_property
    def decoder(self):
        """The model; like Llama it has no biases where it is gated."""
        ids = self.vocabulary_size or len(self.vocabulary)
        if ids < len(self.vocabulary):
            raise sw.ConfigError(f"vocabulary_size={ids} is too small: the text has {len(self.vocabulary)} characters")
        return Decoder(
            ids, self.depth, self.width, self.heads, self.mlp or None,
            gated=self.gated, bias=not self.gated, dropout=self.dropout,
            remat=None if self.remat == "none" else self.remat, experts=self.experts or None,
        )  # fmt: skip

    def model(self, v, tokens):
        return self.decoder(v, tokens)

    def objective(self):
        if self.vocabulary_size:  # too many logits to hold
            return next_token(self.decoder)
        return sw.supervised(self.model, inputs="tokens", target="targets")

    def optimizer(self, steps):
        warmup = min(100, steps // 10 + 1, steps - 1)  # none in a run of a single step
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))

    def report(self, params, state):
        """Write on from the prompt, one character at a time in a window that slides."""
        start = self.start[-self.length :]
        window = jnp.zeros(self.length, "int32").at[: len(start)].set(start)
        key = jax.random.key(self.seed)

        @jax.jit
        def write(params, state, window, at, key):
            logits, _ = sw.apply(self.model, params, state, window[None])
            token = jax.random.categorical(key, logits[0, at - 1, : len(self.vocabulary)] / self.temperature)
            full = at == self.length
            window = jnp.where(full, jnp.roll(window, -1), window).at[jnp.minimum(at, self.length - 1)].set(token)
            return window, jnp.minimum(at + 1, self.length), token

        at, tokens = len(start), []
        for i in range(self.sample):
            window, at, token = write(params, state, window, at, jax.random.fold_in(key, i))
            tokens.append(token)
        return self.prompt + sw.data.decode(jax.device_get(tokens), self.vocabulary)
