"""`text`: a character-level decoder that learns to write like Moby-Dick, and then writes."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import sapwood as sw
from sapwood import layers as L

NOVEL = Path(__file__).parent / "text" / "moby_dick.txt"


@dataclass(frozen=True)
class Text(sw.Recipe):
    """A character-level transformer on a public-domain novel, sampled from when it is trained."""

    epochs: int = 1
    batch_size: int = 16
    file: str | None = None
    length: int = 128
    stride: int = 64
    depth: int = 4
    width: int = 128
    heads: int = 4
    dropout: float = 0.0
    learning_rate: float = 2e-3
    prompt: str = "Call me "
    sample: int = 300
    temperature: float = 0.8

    @cached_property
    def text(self):
        try:
            return Path(self.file or NOVEL).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise sw.DataError(f"{self.file} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#x}"
                               ) from None  # fmt: skip

    @cached_property
    def vocabulary(self):
        return "".join(sorted(set(self.text)))

    @cached_property
    def start(self):
        if not self.prompt:
            raise sw.ConfigError("prompt is empty; at least one character to write on from is expected")
        return sw.data.encode(self.prompt, self.vocabulary)

    def __post_init__(self):
        if self.temperature <= 0:
            raise sw.ConfigError(f"temperature={self.temperature}: above 0 is expected; 0.1 is nearly greedy")
        if self.file is not None:  # so that the run can be read from any folder
            object.__setattr__(self, "file", str(Path(self.file).absolute()))

    def data(self):
        len(self.start)  # a prompt that cannot be read is an error now, not after the training
        cut = int(0.9 * len(self.text))
        windows = partial(sw.data.characters, vocabulary=self.vocabulary)
        train = windows(self.text[:cut], self.length, stride=self.stride)
        return train, windows(self.text[cut:], self.length, stride=self.length)

    def model(self, v, tokens):
        x = L.Embed(len(self.vocabulary), self.width)(v.embed, tokens)
        x = L.Scan(self.block, self.depth)(v.blocks, x)
        return L.Dense(len(self.vocabulary))(v.logits, L.RMSNorm()(v.norm, x))

    def block(self, v, x):
        h = L.MultiHeadAttention(self.heads, causal=True, rotary=L.Rotary())(v.attention, L.RMSNorm()(v.norm1, x))
        x = x + L.Dropout(self.dropout)(v.drop1, h)
        h = jax.nn.gelu(L.Dense(4 * self.width)(v.up, L.RMSNorm()(v.norm2, x)))
        return x + L.Dropout(self.dropout)(v.drop2, L.Dense(self.width)(v.down, h))

    def objective(self):
        return sw.supervised(self.model, inputs="tokens", target="targets")

    def optimizer(self, steps):
        rate = optax.warmup_cosine_decay_schedule(0.0, self.learning_rate, min(100, steps // 10 + 1), steps)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.99))

    def report(self, params, state):
        """Write on from the prompt, one character at a time in a window that slides."""
        start = self.start[-self.length :]
        window = jnp.zeros(self.length, "int32").at[: len(start)].set(start)
        key = jax.random.key(self.seed)

        @jax.jit
        def write(params, state, window, at, key):
            logits, _ = sw.apply(self.model, params, state, window[None])
            token = jax.random.categorical(key, logits[0, at - 1] / self.temperature)
            full = at == self.length
            window = jnp.where(full, jnp.roll(window, -1), window).at[jnp.minimum(at, self.length - 1)].set(token)
            return window, jnp.minimum(at + 1, self.length), token

        at, tokens = len(start), []
        for i in range(self.sample):
            window, at, token = write(params, state, window, at, jax.random.fold_in(key, i))
            tokens.append(token)
        return self.prompt + sw.data.decode(jax.device_get(tokens), self.vocabulary)
