"""Heads and lengths that a mesh does not divide: said with the layer's path and the sizes that would divide."""

import re

import jax
import pytest

import sapwood as sw
from sapwood.models import Decoder
from sapwood.parallel import ShardingWarning

MESH = sw.mesh("data=2,sequence=2,tensor=2")
TOKENS = jax.ShapeDtypeStruct((4, 8), "int32")


def warned(rules=None, tokens=TOKENS, **options):
    """What is said while a decoder is traced, without compiling it."""
    model = Decoder(**{"vocabulary": 16, "depth": 2, "width": 24, "heads": 4, **options})
    params = jax.tree.map(lambda p: p.struct, sw.spec(model, tokens).params)
    place = sw.parallel.placement(MESH, rules)
    with pytest.warns(ShardingWarning) as caught:
        jax.eval_shape(lambda params, tokens: sw.apply(model, params, {}, tokens, place=place)[0], params, tokens)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"heads": 3},
            r"^blocks/attention: activation .*\('heads', size 3\) does not divide by tensor=2: .*2 or 4 would",
        ),
        (
            {"heads": 6, "kv_heads": 3},
            r"activation .* of shape \(4, 8, 3, 4\): .*\('heads', size 3\) does not divide by tensor=2: .*2 or 4 would",
        ),
        (
            {"rules": "ulysses+tensor", "heads": 2},
            r"^blocks/attention: activation \('attention_heads',\) .*size 2\) does not divide by sequence=2: .*4 would",
        ),
        (
            {"tokens": jax.ShapeDtypeStruct((4, 9), "int32")},
            r"^blocks/attention: activation .*\('length', size 9\) does not divide by sequence=2: .*8 or 10 would",
        ),
    ],
)
def test_the_layer_and_the_sizes_that_would_divide(given, message):
    said = warned(**given)
    assert any(re.search(message, line) for line in said), said


@pytest.mark.parametrize(
    ("options", "path"),
    [
        ({"heads": 3}, "blocks/attention/out/kernel"),
        ({"heads": 6, "kv_heads": 3}, "blocks/attention/key/kernel and 1 more like it"),
    ],
)
def test_the_parameter_and_the_sizes_that_would_divide(options, path):
    spec = sw.spec(Decoder(**{"vocabulary": 16, "depth": 2, "width": 192, **options}), TOKENS)
    with pytest.warns(ShardingWarning) as caught:
        sw.parallel.param_shardings(spec.params, MESH)
    message = rf"^{path}: dimension \d \('heads', size 3\) does not divide by tensor=2: .* 2 or 4 would divide"
    assert any(re.search(message, str(warning.message)) for warning in caught)
