"""A plan in PyTorch's words: each process holds what each JAX device does, byte for byte. Needs the extra `torch`."""

import itertools
import math
import os
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from artifex import models
from artifex.config import DeviceConfig
from artifex.interop.torch import to_dtensor
from artifex.models import LAYOUTS, weights
from artifex.scaling.placement import names_of, shapes_of, shardings
from artifex.scaling.plan import Plan
from artifex.scaling.rules import Rules

torch = pytest.importorskip("torch", reason="DTensor placements need: pip install -e '.[torch]'")

LLAMA = ("LlamaForCausalLM", "llama-nano", {"num_layers": 2, "vocab_size": 96})
GPT2 = ("GPT2LMHeadModel", "gpt2-nano", {"num_layers": 2, "vocab_size": 96})
VAE = ("AutoencoderKL", "kl-digits", {})
MESHES = [
    *({"data": 4}, {"fsdp": 4}, {"tensor": 4}, {"fsdp": 2, "tensor": 2}),
    *({"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "context": 2}),
]


def plan_of(sizes, **more):
    count = math.prod(sizes.values())
    return Plan.from_device(DeviceConfig(**sizes, **more), count)


def state_dict_of(model, layout, folder):
    """The tensors that other libraries read."""
    weights.save_pretrained(folder, model, layout=layout)
    return load_file(folder / LAYOUTS[layout].tensors)


def parts_by_device(model, plan, layout):
    """For each device, the tensors of theirs that its own JAX shards make up, by name."""
    mesh, state = plan.make_mesh(jax.devices()[: plan.device_count]), nnx.state(model)
    where = shardings(shapes_of(state), shapes_of(state), names_of(state), plan.rules, "params", mesh)
    placed = jax.tree.leaves_with_path(jax.device_put(nnx.to_pure_dict(state), where))
    ours = {".".join(str(key.key) for key in path): array for path, array in placed}
    shards = {path: {s.device: np.asarray(s.data) for s in array.addressable_shards} for path, array in ours.items()}
    found = []
    for device in mesh.devices.flat:
        found.append({})
        for entry in LAYOUTS[layout].entries(model.cfg):
            parts = [shards[path][device] for path in entry.paths]
            for at in itertools.product(*map(range, ours[entry.paths[0]].shape[: len(entry.counted)])):
                found[-1] |= dict.fromkeys(entry.names(at), entry.join([part[at] for part in parts]))
    return found


def cut(tensor, placements, coordinate, mesh_shape):
    """What the process at a mesh coordinate has of a tensor: each placement in turn divides what is left, by PyTorch's
    own rule for it."""
    for placement, at, ways in zip(placements, coordinate, mesh_shape, strict=True):
        if not placement.is_replicate():
            tensor = placement._split_tensor(tensor, ways, with_padding=False, contiguous=True)[0][at]
    return tensor


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "+".join(sizes))
@pytest.mark.parametrize("family", [LLAMA, GPT2, VAE], ids=lambda family: family[0])
def test_every_process_holds_what_the_jax_device_of_its_rank_does(family, sizes, tmp_path):
    layout, name, fields = family
    model, plan = models.create(name, rngs=nnx.Rngs(0), **fields), plan_of(sizes)
    theirs = state_dict_of(model, layout, tmp_path)
    found = to_dtensor(plan, model)
    assert set(theirs) <= set(found.placements)
    assert {name: found.shapes[name] for name in theirs} == {name: part.shape for name, part in theirs.items()}
    for rank, expected in enumerate(parts_by_device(model, plan, layout)):
        coordinate = np.unravel_index(rank, plan.mesh_shape)
        for name, whole in theirs.items():
            part = cut(torch.from_numpy(whole), found.placements[name], coordinate, plan.mesh_shape)
            assert np.array_equal(part.numpy(), expected[name]), (name, rank)


def test_a_matrix_in_one_and_three_in_one():
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    llama = to_dtensor(plan_of({"fsdp": 4, "tensor": 2}), "llama-nano").placements
    # ours (embed, heads, head_dim), theirs (heads * head_dim, embed)
    assert llama["model.layers.1.self_attn.q_proj.weight"] == (Shard(1), Shard(0))
    assert llama["model.layers.1.self_attn.o_proj.weight"] == (Shard(0), Shard(1))
    # query, key and value one after the other: a device has a piece of each
    gpt2 = to_dtensor(plan_of({"data": 2, "tensor": 2}), "gpt2").placements
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == (Replicate(), _StridedShard(1, split_factor=3))


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("llama-nano", "LlamaForCausalLM"),
        ("qwen3-nano", "Qwen3ForCausalLM"),
        ("gemma2-nano", "Gemma2ForCausalLM"),
        ("gpt2-nano", "GPT2LMHeadModel"),
    ],
)
def test_names_and_shapes_are_those_of_the_state_dict_in_transformers(name, architecture):
    transformers = pytest.importorskip("transformers", reason="their state dicts need: pip install -e '.[parity]'")
    config = transformers.AutoConfig.for_model(**LAYOUTS[architecture].write_config(models.preset(name)))
    with torch.device("meta"):
        theirs = getattr(transformers, architecture)(config).state_dict()
    found = to_dtensor(plan_of({"fsdp": 4, "tensor": 2}), name)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_of_two_axes_on_one_dim_the_slower_comes_first():
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    def up(*axes):
        rules = Rules.of(params={"mlp": axes}, strategy="by hand")
        found = to_dtensor(Plan((2, 2), ("dp", "tp"), rules), "llama-nano")
        return found.placements["model.layers.0.mlp.up_proj.weight"]

    assert up("dp", "tp") == (Shard(0), Shard(0))
    # the example of PyTorch's own `_StridedShard`: first by tp, then each part by dp
    assert up("tp", "dp") == (_StridedShard(0, split_factor=2), Shard(0))


def test_a_preset_a_configuration_and_a_model_are_placed_alike():
    plan, cfg = plan_of({"fsdp": 2, "tensor": 2}), models.preset("llama-nano")
    model = nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))
    assert to_dtensor(plan, "llama-nano") == to_dtensor(plan, cfg) == to_dtensor(plan, model)


@pytest.mark.parametrize(
    "name, sizes, message",
    [
        ("moe-nano", {"expert": 4}, r"layers\.moe\.gate\.kernel: .* experts over mesh axis expert, .*w1\.weight"),
        ("gpt2", {"pipeline": 2}, r"layers\.attention_norm\.scale: .* layers over mesh axis pipeline"),
        ("linear-nano", {"data": 2}, "no layout of another library"),
    ],
)
def test_what_no_placement_says_is_an_error_that_names_the_parameter(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        to_dtensor(plan_of(sizes), name)


def test_without_pytorch_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", None)
    with pytest.raises(ImportError, match=r"artifex\[torch\]"):
        to_dtensor(plan_of({"data": 2}), "llama-nano")


def test_tensors_that_do_not_fit_are_refused():
    found = to_dtensor(plan_of({"data": 2}), "llama-nano")
    with pytest.raises(ValueError, match=r"lm_tail\.weight is no tensor of this model"):
        found.distribute({"lm_tail.weight": torch.zeros(1)}, None)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(7,\), expected"):
        found.distribute({"model.norm.weight": torch.zeros(7)}, None)


PROCESS = """
import pickle, sys
import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from artifex.interop.torch import DTensorLayout

folder, file, rank, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
store = dist.FileStore(f"{folder}/store", count)
dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
with open(f"{folder}/layout", "rb") as stream:
    layout = pickle.load(stream)
theirs = load_file(f"{folder}/{file}")
tensors = layout.distribute(theirs, layout.device_mesh("cpu"))
for name, tensor in tensors.items():
    assert tensor.shape == theirs[name].shape
    assert torch.equal(tensor.full_tensor(), theirs[name]), name
np.savez(f"{folder}/{rank}.npz", **{name: tensor.to_local().numpy() for name, tensor in tensors.items()})
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES[:4], ids=lambda sizes: "+".join(sizes))
@pytest.mark.parametrize("family", [LLAMA, GPT2], ids=lambda family: family[0])
def test_processes_of_gloo_hold_the_jax_shards_and_gather_the_whole(family, sizes, tmp_path):
    layout, name, fields = family
    model, plan = models.create(name, rngs=nnx.Rngs(0), **fields), plan_of(sizes)
    theirs = state_dict_of(model, layout, tmp_path)
    (tmp_path / "layout").write_bytes(pickle.dumps(to_dtensor(plan, model)))
    words = [sys.executable, "-c", PROCESS, str(tmp_path), LAYOUTS[layout].tensors]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "GLOO_SOCKET_IFNAME": "lo"}
    running = [subprocess.Popen([*words, str(rank), "4"], env=env, stderr=subprocess.PIPE) for rank in range(4)]
    for process in running:
        said = process.communicate(timeout=240)[1].decode()
        assert process.returncode == 0, said[-2000:]
    for rank, expected in enumerate(parts_by_device(model, plan, layout)):
        with np.load(tmp_path / f"{rank}.npz") as held:
            assert set(held) == set(theirs)
            assert [name for name in theirs if not np.array_equal(held[name], expected[name])] == []
