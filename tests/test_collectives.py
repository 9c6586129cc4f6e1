"""What compiled programs send: on programs for eight CPU devices, and on texts of other compilers.

The expected lists are by hand. Each device holds float32[2, 8] of the input.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxnorm.diagnose import Collective, collectives

DEVICES = 8
VECTOR = "f32[8]"


def shared(x):
    return lax.psum(x.sum(0), "d")


def compiled(function):
    """`function` of one device's part, for a mesh of eight devices."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False)
    return jax.jit(mapped).lower(jnp.zeros((2 * DEVICES, 8))).compile()


def sum_of_sums(x):
    total, squares, least = lax.psum((x.sum(0), (x * x).sum(0), x[0, 0]), "d")
    return total + least * squares


def sometimes(x):
    total = shared(x)
    return lax.cond(total[0] > 3, lambda v: lax.psum(v * v, "d"), lambda v: v, x)


def one_of_three(x):
    branches = [lambda v: v, lambda v: lax.pmax(v, "d"), lambda v: lax.psum(v, "d")]
    return lax.switch(lax.axis_index("d") * 0 + x[0, 0].astype(jnp.int32), branches, x)


def repeatedly(x):
    return lax.scan(lambda v, _: (lax.psum(jnp.sin(v), "d"), None), x, length=5)[0]


def sometimes_repeatedly(x):
    return lax.cond(x[0, 0] > 3, repeatedly, lambda v: v, x)


def repeatedly_sometimes(x):
    def often(v, _):
        return lax.cond(v[0, 0] > 3, lambda v: lax.psum(jnp.sin(v), "d"), jnp.cos, v), None

    return lax.scan(often, x, length=5)[0]


PROGRAMS = {
    "nothing": (lambda x: x * 2, []),
    "one sum": (shared, [Collective("all-reduce", (VECTOR,), 32)]),
    "three sums, merged": (
        sum_of_sums,
        [Collective("all-reduce", (VECTOR, VECTOR, "f32[]"), 68)],
    ),
    "a sum of 16 bits": (
        # The CPU adds bfloat16 as float32.
        lambda x: lax.psum(x.astype(jnp.bfloat16), "d"),
        [Collective("all-reduce", ("f32[2,8]",), 64)],
    ),
    "two sums, one of the other": (
        lambda x: lax.psum(jnp.sin(shared(x)), "d"),
        [Collective("all-reduce", (VECTOR,), 32)] * 2,
    ),
    "in a branch": (
        sometimes,
        [
            Collective("all-reduce", (VECTOR,), 32),
            Collective("all-reduce", ("f32[2,8]",), 64, conditional=True),
        ],
    ),
    "in two of three branches": (
        one_of_three,
        [Collective("all-reduce", ("f32[2,8]",), 64, conditional=True)] * 2,
    ),
    "in a loop": (repeatedly, [Collective("all-reduce", ("f32[2,8]",), 64, repeated=True)]),
    "in a loop in a branch": (
        sometimes_repeatedly,
        [Collective("all-reduce", ("f32[2,8]",), 64, conditional=True, repeated=True)],
    ),
    "in a branch in a loop": (
        repeatedly_sometimes,
        [Collective("all-reduce", ("f32[2,8]",), 64, conditional=True, repeated=True)],
    ),
    "gathered": (
        lambda x: lax.all_gather(x, "d"),
        [Collective("all-gather", ("f32[1,2,8]",), 64)],
    ),
    "to the neighbour": (
        lambda x: lax.ppermute(x, "d", [(i, (i + 1) % DEVICES) for i in range(DEVICES)]),
        [Collective("collective-permute", ("f32[2,8]",), 64)],
    ),
    "summed and scattered": (
        lambda x: lax.psum_scatter(x, "d", scatter_dimension=1),
        [Collective("reduce-scatter", ("f32[2,8]",), 64)],
    ),
    "transposed": (
        lambda x: lax.all_to_all(x, "d", 1, 0),
        [Collective("all-to-all", ("f32[1,2,1]",) * DEVICES, 64)],
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_on_eight_devices(name):
    function, expected = PROGRAMS[name]
    program = compiled(function)
    assert collectives(program) == tuple(expected)
    assert collectives(program.as_text()) == tuple(expected)


def test_under_pmap():
    program = jax.pmap(shared, axis_name="d").lower(jnp.ones((DEVICES, 2, 8))).compile()
    assert collectives(program) == (Collective("all-reduce", (VECTOR,), 32),)


def test_what_the_compiler_inserts():
    """Under `jit` with sharded arrays the source names no collective."""
    mesh = jax.make_mesh((DEVICES,), ("d",), axis_types=(AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, P("d"))
    x = jax.ShapeDtypeStruct((2 * DEVICES, 8), jnp.float32, sharding=sharding)
    program = jax.jit(lambda x: x - x.mean(0, keepdims=True)).lower(x).compile()
    assert collectives(program) == (Collective("all-reduce", (VECTOR,), 32),)


REDUCTION = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}
"""


def text(body, *computations):
    """A program on 8 numbers x."""
    entry = "ENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0:T(128)S(1)} parameter(0)\n"
    return "\n".join([REDUCTION, *computations, entry + body + "\n}"])


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0},{1},{2}}",
        "replica_groups=[3,1]<=[3]",
        "replica_groups=mesh['x'=3,'y'=1] {'y'}",
        "replica_groups=mesh['x'=4] {'x':(4)1}",
    ],
)
def test_groups_of_one_device_send_nothing(groups):
    body = "  ROOT %y = f32[8]{0} all-reduce(%x), channel_id=1, GROUPS, to_apply=%add"
    assert collectives(text(body.replace("GROUPS", groups))) == ()


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={}",
        "replica_groups={{0,1},{2}}",
        "replica_groups=[1,3]<=[3]",
        "replica_groups=[2,2]<=[2,2]T(1,0)",
        "replica_groups=mesh['x'=3,'y'=1] {'x','y'}",
        "replica_groups=mesh['x'=4] {'x':(1)2}",
    ],
)
def test_groups_of_several_devices_send(groups):
    body = "  ROOT %y = f32[8]{0} all-reduce(%x), channel_id=1, GROUPS, to_apply=%add"
    assert collectives(text(body.replace("GROUPS", groups))) == (
        Collective("all-reduce", (VECTOR,), 32),
    )


def test_permutations_of_a_device_to_itself_send_nothing():
    for pairs, found in (("{{0,0},{1,1}}", 0), ("{{0,1},{1,1}}", 1)):
        body = f"  ROOT %y = f32[8]{{0}} collective-permute(%x), source_target_pairs={pairs}"
        assert len(collectives(text(body))) == found


def test_start_and_done_are_one():
    body = """
  %begun = (f32[8]{0}, f32[16]{0}) all-gather-start(%x), replica_groups={{0,1}}, dimensions={0}
  %all = f32[16]{0} all-gather-done(%begun)
  %sum-begun = f32[8]{0} all-reduce-start(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %sum = f32[8]{0} all-reduce-done(%sum-begun)"""
    assert collectives(text(body)) == (
        Collective("all-gather", (VECTOR,), 32),
        Collective("all-reduce", (VECTOR,), 32),
    )


def test_a_wrapped_computation_runs_once():
    wrapped = """
%wrapped (p: f32[8]) -> f32[4] {
  %p = f32[8]{0} parameter(0)
  ROOT %part = f32[4]{0} reduce-scatter(%p), replica_groups={{0,1}}, to_apply=%add
}"""
    body = """
  %begun = ((f32[8]{0}), f32[4]{0}, s32[]) async-start(%x), calls=%wrapped
  %going = ((f32[8]{0}), f32[4]{0}, s32[]) async-update(%begun), calls=%wrapped
  ROOT %part = f32[4]{0} async-done(%going), calls=%wrapped"""
    assert collectives(text(body, wrapped)) == (Collective("reduce-scatter", (VECTOR,), 32),)


def test_branches_by_truth_value_and_calls_within_them():
    branches = """
%inner (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}
%yes (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} call(%p), to_apply=%inner
}
%no (p: f32[8]) -> f32[8] {
  ROOT %p = f32[8]{0} parameter(0)
}"""
    body = """
  %far = pred[] constant(false)
  %y = f32[8]{0} conditional(%far, %x, %x), true_computation=%yes, false_computation=%no
  ROOT %z = f32[8]{0} call(%y), to_apply=%inner"""
    assert collectives(text(body, branches)) == (
        Collective("all-reduce", (VECTOR,), 32, conditional=True),
        Collective("all-reduce", (VECTOR,), 32),
    )


def test_the_links_of_a_chain_are_one():
    """A TPU overlaps a collective with fusions by repeating it inside each of them."""
    links = "".join(
        f"""
%link{n} (p: f32[8]) -> f32[16] {{
  %p = f32[8]{{0}} parameter(0)
  ROOT %all = f32[16]{{0}} all-gather(%p), replica_groups={{{{0,1}}}}, dimensions={{0}}, CHAIN{n}
}}"""
        for n in range(2)
    )
    body = """
  %first = f32[16]{0} fusion(%x), kind=kLoop, calls=%link0
  ROOT %second = f32[16]{0} fusion(%x), kind=kLoop, calls=%link1"""
    for chains, found in (("00", 1), ("01", 2)):
        program = text(body, links)
        for number, chain in enumerate(chains):
            program = program.replace(
                f"CHAIN{number}", f'frontend_attributes={{chain_id="{chain}"}}'
            )
        assert len(collectives(program)) == found
