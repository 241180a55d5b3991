"""`text`: trains a character-level decoder on Moby-Dick, then writes text with it.

`SIZES` holds the hyper-parameters of each size. A field declared by `_sized` takes its default from there.
"""

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

NOVEL = Path(__file__).parent / "novel" / "moby_dick.txt"

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
"""Maps each size to the default values of the fields that depend on it."""


def _sized() -> Any:
    """A field whose default depends on the size: None is replaced by the value in `SIZES`."""
    return field(default=None, metadata={"default": "that of the size"})


@dataclass(frozen=True)
class Text(sw.Recipe):
    """A character-level transformer on a public-domain novel, sampled from when it is trained.

    Args:
        size: the set of hyper-parameters in `SIZES` that gives the fields without a value their defaults. "1.7b" is a
            language model for a TPU slice or several GPUs: SwiGLU, bfloat16, remat, and a vocabulary of 32,000 ids, of
            which the characters of a text use the first few.
        epochs: passes over the training windows.
        batch_size: windows in a batch.
        policy: the dtype that layers compute in.
        file: the path of a UTF-8 text to learn from; None for Moby-Dick.
        length: characters in a window.
        stride: characters between the starts of two training windows.
        depth: transformer blocks.
        width: features of a token.
        heads: attention heads.
        mlp: hidden units of the feed-forward part; 0 for 4 x width.
        gated: use SwiGLU for the feed-forward part, and no biases.
        vocabulary_size: ids of the vocabulary; 0 for as many as the text has distinct characters.
        remat: the part of each block that the backward pass recomputes; see `Decoder`.
        experts: 8 makes each feed-forward part a mixture of 8 experts, 2 of them per token; 0 for no mixture.
        dropout: the dropout rate.
        learning_rate: the peak learning rate.
        prompt: the text that the sample continues.
        sample: characters to write after the training; 0 for none.
        temperature: the temperature of the sampling, above 0; 0.1 is nearly greedy.
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
        """The text to learn from. Raises `DataError` if the file is empty or not UTF-8."""
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
        """The distinct characters of the text, sorted; the index of a character is its id."""
        return "".join(sorted(set(self.text)))

    @cached_property
    def start(self):
        """The ids of the prompt's characters. Raises `ConfigError` for an empty prompt."""
        if not self.prompt:
            raise sw.ConfigError("prompt is empty; at least one character to write on from is expected")
        return sw.data.encode(self.prompt, self.vocabulary)

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise sw.ConfigError(f"size is {self.size!r}; one of {', '.join(SIZES)} is expected")
        for name, value in SIZES[self.size].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if not self.temperature > 0:  # `not >` also refuses NaN
            raise sw.ConfigError(f"temperature={self.temperature}: above 0 is expected; 0.1 is nearly greedy")
        if self.sample < 0:
            raise sw.ConfigError(f"sample={self.sample}: a number of characters to write is expected; 0 for none")
        if self.experts == 1:  # each token goes to two experts
            raise sw.ConfigError("experts=1: at least 2 are expected, or 0 for no mixture")
        if self.file is not None:  # so that the run can be read from any folder
            object.__setattr__(self, "file", str(Path(self.file).expanduser().absolute()))

    def data(self) -> tuple[Any, Any]:
        len(self.start)  # a bad prompt raises here, and not after the training
        cut = int(0.9 * len(self.text))
        windows = partial(sw.data.characters, vocabulary=self.vocabulary)
        train = windows(self.text[:cut], self.length, stride=self.stride)
        return train, windows(self.text[cut:], self.length, stride=self.length)

    @cached_property
    def decoder(self):
        """The model. A gated one has no biases, as in Llama."""
        ids = self.vocabulary_size or len(self.vocabulary)
        if ids < len(self.vocabulary):
            raise sw.ConfigError(f"vocabulary_size={ids} is too small: the text has {len(self.vocabulary)} characters")
        return Decoder(
            ids, self.depth, self.width, self.heads, self.mlp or None,
            gated=self.gated, bias=not self.gated, dropout=self.dropout,
            remat=None if self.remat == "none" else self.remat, experts=self.experts or None,
        )  # fmt: skip

    def model(self, v: sw.Vars, tokens: Any) -> Any:
        return self.decoder(v, tokens)

    def objective(self) -> Any:
        if self.vocabulary_size:  # the logits do not fit into memory
            return next_token(self.decoder)
        return sw.supervised(self.model, inputs="tokens", target="targets")

    def optimizer(self, steps: int) -> Any:
        warmup = min(100, steps // 10 + 1, steps - 1)  # 0 in a run of one step
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, warmup, steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))

    def report(self, params: dict[str, Any], state: dict[str, Any]) -> str | None:
        """Continue the prompt by ``sample`` characters, one at a time, with a sliding window of ``length`` of them."""
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
