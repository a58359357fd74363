"""Weights in and out: what is written is read back, straight into shards, and files made to deceive are refused."""

import contextlib
import dataclasses
import json
import math
import os
import struct
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from artifex import models, sample
from artifex.data.tokenizers import ByteTokenizer
from artifex.models import layers, weights
from artifex.models.layouts import Entry, Layout
from artifex.models.weights_config import preset_like
from artifex.scaling.placement import names_of

SMALL = {"vocab_size": 64, "embed_dim": 32, "num_heads": 4, "mlp_dim": 48, "sequence_length": 40, "head_dim": 8}
# architecture -> (preset, fields of it)
SMALL_MODELS = {
    "LlamaForCausalLM": ("llama3-8b", {"num_layers": 2, "num_kv_heads": 2, "rope_scaling_factor": 8.0}),
    "MistralForCausalLM": ("mistral-7b", {"num_layers": 2, "num_kv_heads": 2, "window": 8}),
    "MixtralForCausalLM": ("mixtral-8x7b", {"num_layers": 2, "num_kv_heads": 2, "num_experts": 4}),
    "Qwen3ForCausalLM": ("qwen3-0.6b", {"num_layers": 2, "num_kv_heads": 2, "norm_eps": 1e-4}),
    "Gemma2ForCausalLM": ("gemma2-2b", {"num_layers": 4, "num_kv_heads": 2, "query_scale": 12**-0.5}),
    "GPT2LMHeadModel": ("gpt2", {"num_layers": 2, "dropout": 0.25}),
}


@dataclasses.dataclass(frozen=True)
class PairConfig:
    """A model of the tests' own: it has all that a tree can have."""

    layers: int = 2
    width: int = 16
    shape: tuple[int, ...] = (3, 5)

    def build(self, rngs):
        return Pair(self)


class Pair(nnx.Module):
    """A stack, a codebook without gradient, an integer, and a list of modules."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.wide = layers.parameter(jnp.zeros((cfg.layers, 4, cfg.width)), "layers", "embed", "mlp")
        self.codes = layers.buffer(jnp.zeros((8, cfg.width)), "codes", "mlp")
        self.age = layers.buffer(jnp.zeros((), jnp.int32))
        self.parts = nnx.List([layers.RMSNorm(4), layers.RMSNorm(4)])


def read_pair(config) -> PairConfig:
    return PairConfig(config["layers"], config["width"])


def write_pair(cfg: PairConfig) -> dict:
    return {"_class_name": "TheirPair", "layers": cfg.layers, "width": cfg.width}


def pair_entries(cfg: PairConfig) -> list[Entry]:
    return [
        Entry("blocks.{layers}.weight", "wide", (1, 0)),
        Entry("blocks.{layers}.codes", "codes", copies=cfg.layers),
        Entry("age", "age"),
        Entry("norms", ("parts.0.scale", "parts.1.scale")),
    ]


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setitem(models.PRESETS, "pair", PairConfig())
    layout = Layout("TheirPair", read_pair, write_pair, pair_entries, tensors="diffusion_pytorch_model.safetensors")
    monkeypatch.setitem(models.LAYOUTS, "TheirPair", layout)
    return PairConfig(shape=(7, 1))


def random_params(cfg):
    """Values for every parameter and buffer of a model, made without building it."""
    generator = np.random.default_rng(0)
    abstract = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0)))))
    return jax.tree.map(lambda leaf: (10 * generator.normal(size=leaf.shape)).astype(leaf.dtype), abstract)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def small(architecture: str):
    preset, fields = SMALL_MODELS[architecture]
    return preset, models.preset(preset, **(SMALL | fields))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama with a tied head, as transformers writes it."""
    cfg = models.preset("llama-nano", **SMALL, num_layers=2)
    folder, params = tmp_path_factory.mktemp("llama"), random_params(cfg)
    weights.save_pretrained(folder, "llama-nano", cfg, params, layout="huggingface")
    return folder, params


@pytest.fixture
def change(llama, tmp_path):
    """The small Llama's folder again, changed: `change(tensors={name: array or None}, **keys of config.json)`."""

    def changed(tensors=None, **keys):
        config = json.loads((llama[0] / "config.json").read_text()) | keys
        (tmp_path / "config.json").write_text(json.dumps(config))
        stored = load_file(llama[0] / "model.safetensors") | (tensors or {})
        save_file({name: value for name, value in stored.items() if value is not None}, tmp_path / "model.safetensors")
        return tmp_path

    return changed


def refused(folder, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        weights.from_pretrained(folder)
    assert "\n" not in str(error.value)


def write_raw(file, header, data=b"", length=None):
    """A file of exactly these bytes; `length` replaces the header's."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def test_what_is_written_is_read_back_with_buffers_integers_and_lists(pair, tmp_path):
    params = random_params(pair)
    weights.save_pretrained(tmp_path, "pair", pair, params)
    model = weights.from_pretrained(tmp_path)
    assert model.cfg == pair
    assert_equal(params_of(model), params)
    assert names_of(model)["wide"] == ("layers", "embed", "mlp")
    assert isinstance(model.codes, layers.Buffer) and isinstance(model.wide, nnx.Param)
    weights.save_pretrained(tmp_path / "again", model)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == {
        "wide",
        "codes",
        "age",
        "parts.0.scale",
        "parts.1.scale",
    }
    assert_equal(params_of(weights.from_pretrained(tmp_path / "again")), params)


@pytest.mark.parametrize("architecture", SMALL_MODELS)
def test_another_librarys_layout_is_read_back_equal(architecture, tmp_path):
    preset, cfg = small(architecture)
    params = random_params(cfg)
    weights.save_pretrained(tmp_path, preset, cfg, params, layout="huggingface")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [architecture]
    model = weights.from_pretrained(tmp_path)
    assert_equal(params_of(model), params)
    again = weights.read_config(tmp_path)
    assert again == model.cfg and models.LAYOUTS[architecture].write_config(again)


@pytest.mark.parametrize(
    "name", [name for name, cfg in models.PRESETS.items() if name.endswith(("-8b", "-nano", "-7b"))]
)
def test_a_model_without_a_name_is_written_as_the_preset_it_is_most_like(name, tmp_path):
    cfg = models.preset(name)
    other = {"dropout": 0.25} if hasattr(cfg, "dropout") else {"sampling_steps": 3}
    assert preset_like(cfg) == name and preset_like(dataclasses.replace(cfg, **other)) == name


def test_the_layouts_of_a_model_are_those_it_can_be_written_in():
    for architecture, (preset, fields) in SMALL_MODELS.items():
        found = models.layouts_of(models.preset(preset, **(SMALL | fields)))
        assert found[0] == "artifex" and architecture in found
    assert models.layouts_of(models.preset("llama-nano", norm="layernorm")) == ["artifex"]
    said = weights.save_pretrained.__doc__
    assert [name for name in models.LAYOUTS if name not in said] == [], "the docstring lists every layout"


@pytest.mark.parametrize("layout", ["artifex", "huggingface"])
def test_a_folder_with_its_tokenizer_samples(layout, tmp_path):
    model = models.create("llama-nano", rngs=nnx.Rngs(0), **SMALL | {"vocab_size": 256}, num_layers=1)
    weights.save_pretrained(tmp_path / "bare", model, layout=layout)
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer.json, .* save_pretrained\(..., tokenizer=...\)"):
        sample.sample(tmp_path / "bare", "def ")
    weights.save_pretrained(tmp_path / "one", model, layout=layout, tokenizer=ByteTokenizer())
    weights.save_pretrained(tmp_path / "two", model, layout=layout, tokenizer=tmp_path / "one" / "tokenizer.json")
    texts = [sample.sample(tmp_path / name, "def ", num_tokens=5, temperature=0) for name in ("one", "two")]
    drawn = model.sample(jax.random.key(0), prompt=np.frombuffer(b"def ", np.uint8)[None], num_tokens=5, temperature=0)
    assert texts[0] == texts[1] == ["def " + ByteTokenizer().decode(drawn[0])]
    for wrong, message in ((3, "tokenizer is of type int"), ("nowhere.json", "tokenizer nowhere.json is no file")):
        with pytest.raises(ValueError, match=message):
            weights.save_pretrained(tmp_path / "three", model, tokenizer=wrong)
    assert not (tmp_path / "three").exists()


def test_a_layout_writes_the_tensors_it_says(pair, tmp_path):
    params = random_params(pair)
    weights.save_pretrained(tmp_path, "pair", pair, params, layout="TheirPair")
    theirs = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert theirs.keys() == {"blocks.0.weight", "blocks.1.weight", "blocks.0.codes", "blocks.1.codes", "age", "norms"}
    np.testing.assert_array_equal(theirs["blocks.1.weight"], params["wide"][1].T)
    norms = [params["parts"][i]["scale"] for i in range(2)]
    np.testing.assert_array_equal(theirs["norms"], np.concatenate(norms))
    np.testing.assert_array_equal(theirs["blocks.1.codes"], params["codes"])
    assert_equal(params_of(weights.from_pretrained(tmp_path)), params)
    theirs["blocks.1.codes"][7, 15] += 1
    save_file(theirs, tmp_path / "diffusion_pytorch_model.safetensors")
    refused(tmp_path, "holds blocks.1.codes unlike blocks.0.codes")


def layout_of(cfg):
    """The layout that can hold a model of this configuration and its config.json, in a list; empty where none can."""
    for layout in models.LAYOUTS.values():
        if layout.config is type(cfg):
            try:
                return [(layout, layout.write_config(cfg))]
            except ValueError:
                continue
    return []


def configurations_with_a_layout() -> dict:
    """Every preset, and every part of one such as a network, that another library has words for; each once."""
    found = {}
    for name, cfg in models.PRESETS.items():
        parts = {f"{name}.{field.name}": getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
        for where, one in {name: cfg, **parts}.items():
            seen = [other for other, _, _ in found.values()]
            if dataclasses.is_dataclass(one) and one not in seen:
                found.update((where, (one, *fits)) for fits in layout_of(one))
    return found


PUBLISHED = configurations_with_a_layout()


def test_every_layout_has_a_preset():
    assert {layout.architecture for _, layout, _ in PUBLISHED.values()} == set(models.LAYOUTS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layout_covers_every_parameter_once(name):
    cfg, layout, config = PUBLISHED[name]
    state = nnx.state(nnx.eval_shape(lambda: cfg.build(nnx.Rngs(0))))
    shapes = {".".join(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    entries = [entry for entry in layout.entries(layout.read_config(config)) if not entry.optional]
    assert sorted(path for entry in entries for path in entry.paths) == sorted(shapes)
    numbers, names = 0, []
    for entry in entries:
        parts = [shapes[path] for path in entry.paths]
        counts = parts[0][: len(entry.counted)]
        numbers += math.prod(counts) * math.prod(entry.their_shape([part[len(counts) :] for part in parts]))
        names += [name for at in np.ndindex(counts) for name in entry.names(at)]
    assert numbers == sum(map(math.prod, shapes.values()))
    assert len(names) == len(set(names))


@pytest.fixture
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "MixtralForCausalLM"])
def test_reading_into_shards_equals_reading_whole(architecture, mesh, tmp_path):
    preset, cfg = small(architecture)
    weights.save_pretrained(tmp_path, preset, cfg, random_params(cfg), layout=architecture)
    split = {"heads": "model", "kv_heads": "data", "mlp": "model", "expert_mlp": "model", "vocab": "model"}
    split |= {"embed": "data", "layers": None, "positions": "model"}

    def shardings(state):
        # no axis twice on one tensor: the first dim keeps it
        def spec(names):
            axes = [split.get(name) for name in names]
            return PartitionSpec(*(axis if axis not in axes[:i] else None for i, axis in enumerate(axes)))

        return jax.tree.map(
            lambda names: NamedSharding(mesh, spec(names)),
            names_of(state),
            is_leaf=lambda node: isinstance(node, tuple),
        )

    whole, model = weights.from_pretrained(tmp_path), weights.from_pretrained(tmp_path, shardings=shardings)
    assert_equal(params_of(model), params_of(whole))
    query = model.layers.attention.query.kernel[...]
    assert query.sharding.spec == PartitionSpec(None, "data", "model", None)
    assert {shard.data.shape for shard in query.addressable_shards} == {(2, 16, 1, 8)}


@contextlib.contextmanager
def peak_memory():
    """Python's and NumPy's, in bytes, from here to the end of the block."""
    tracemalloc.start()
    most = []
    try:
        yield lambda: most[0]
        most.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


def test_the_host_reads_each_shard_alone_and_holds_one_at_a_time(pair, mesh, tmp_path, monkeypatch):
    cfg = PairConfig(layers=8, width=2**17)  # 16 MB
    params = random_params(cfg)
    weights.save_pretrained(tmp_path, "pair", cfg, params, layout="TheirPair")
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda leaf: whole, params)
    where["wide"] = NamedSharding(mesh, PartitionSpec("model", None, "data"))
    where["codes"] = NamedSharding(mesh, PartitionSpec(None, ("data", "model")))
    given = []

    def put(values, device):  # a simulated device would keep the host's buffer as its own
        given.append((values.nbytes, device))
        return jnp.zeros(values.shape, values.dtype, device=device)

    monkeypatch.setattr(jax, "device_put", put)
    monkeypatch.setattr(weights, "PIECE", 2**18)  # what is compared at once
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    with peak_memory() as peak:
        weights.read_params(tmp_path, abstract, cfg, where)
    share = params["wide"].nbytes // 8
    assert [size for size, _ in given if size == share] == [share] * 8
    assert max(size for size, _ in given) == share and len({device for _, device in given}) == 8
    assert share <= peak() < 2 * share  # of 8


def test_writing_holds_one_tensor_of_theirs_at_a_time(pair, mesh, tmp_path):
    cfg = PairConfig(layers=8, width=2**17)
    params = random_params(cfg)
    placed = jax.tree.map(lambda leaf: jnp.asarray(leaf), params)
    placed["wide"] = jax.device_put(params["wide"], NamedSharding(mesh, PartitionSpec("model", None, "data")))
    with peak_memory() as peak:
        weights.save_pretrained(tmp_path, "pair", cfg, placed, layout="TheirPair")
    assert peak() < 3 * params["codes"].nbytes  # the largest tensor; one more where it is turned around
    assert_equal(params_of(weights.from_pretrained(tmp_path)), params)


def test_large_models_are_several_files_with_an_index(llama, tmp_path):
    model = weights.from_pretrained(llama[0])
    weights.save_pretrained(tmp_path, model, layout="LlamaForCausalLM", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)
    ]
    assert all(sum(value.nbytes for value in load_file(file).values()) <= 20_000 for file in files)
    whole = load_file(llama[0] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in whole.values())
    assert {name: file for file in files for name in load_file(file)} == {
        name: tmp_path / file for name, file in index["weight_map"].items()
    }
    assert_equal(params_of(weights.from_pretrained(tmp_path)), llama[1])
    weights.save_pretrained(tmp_path, model, max_shard_bytes=30_000)
    assert weights.holds_weights(tmp_path) and not (tmp_path / "model.safetensors").exists()
    assert_equal(params_of(weights.from_pretrained(tmp_path)), llama[1])
    weights.save_pretrained(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_a_failed_write_leaves_the_folder_as_it_was(llama, tmp_path):
    model = weights.from_pretrained(llama[0])
    weights.save_pretrained(tmp_path, model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    params = jax.tree.map(np.asarray, llama[1])
    params["norm"]["scale"] = params["norm"]["scale"].astype(np.complex64)
    with pytest.raises(ValueError, match=r"norm\.scale is complex64"):
        weights.save_pretrained(tmp_path, "llama-nano", model.cfg, params)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_parameters_become_the_dtype_asked_for_and_integers_stay(pair, tmp_path):
    weights.save_pretrained(tmp_path, "pair", pair, random_params(pair))
    model = weights.from_pretrained(tmp_path, dtype=jnp.bfloat16)
    assert model.wide.dtype == jnp.bfloat16 and model.age.dtype == jnp.int32
    weights.save_pretrained(tmp_path / "bfloat16", model)
    again = weights.from_pretrained(tmp_path / "bfloat16")
    assert again.wide.dtype == jnp.float32
    np.testing.assert_array_equal(again.wide[...], model.wide[...].astype(jnp.float32))


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_floats_are_read_exactly_wherever_they_lie_in_the_file(dtype, pair, tmp_path):
    values = np.arange(128, dtype=np.float32) * 0.25  # exact in all three
    kind = {"F32": np.float32, "BF16": jnp.bfloat16, "F16": np.float16}[dtype]
    shapes = {"wide": [2, 4, 16], "codes": [8, 16], "parts.0.scale": [4], "parts.1.scale": [4]}
    header, data = {"age": {"dtype": "I32", "shape": [], "data_offsets": [0, 4]}}, struct.pack("<i", -7)
    for name, shape in shapes.items():
        part = values[: math.prod(shape)].astype(kind).tobytes()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(part)]}
        data += part
    (tmp_path / "config.json").write_text('{"model": {"name": "pair"}}')
    text = json.dumps(header).encode()
    write_raw(tmp_path / "model.safetensors", text + b" " * (1 - len(text) % 2), data)  # at odd bytes
    model = weights.from_pretrained(tmp_path)
    np.testing.assert_array_equal(model.wide[...], values.reshape(2, 4, 16))
    assert model.age[...] == -7


def test_tensors_that_do_not_fit_are_counted_and_the_first_five_named(change):
    norm = "model.layers.0.input_layernorm.weight"
    refused(change({norm: None}), f"missing {norm}$")
    refused(change({"zzz": np.zeros(3)}), "unknown zzz$")
    refused(change({norm: np.zeros((2, 32), np.float32)}), rf"{norm} is float32\[2, 32\], expected float32\[32\]$")
    refused(change({norm: np.zeros(32, np.int32)}), rf"{norm} is int32\[32\], expected float32\[32\]$")
    refused(change({norm: np.zeros(32, np.float64)}), rf"{norm} is float64\[32\], expected float32\[32\]$")
    refused(change({f"extra.{i}": np.zeros(1) for i in range(12)}), "unknown extra.2 and 7 more$")
    refused(change(num_hidden_layers=10**12), "describes 9,000,000,000,00. tensors, .* holds 20$")


def test_a_tied_head_may_stand_in_the_file_only_if_it_is_the_table(change, llama):
    table = load_file(llama[0] / "model.safetensors")["model.embed_tokens.weight"]
    assert_equal(params_of(weights.from_pretrained(change({"lm_head.weight": table}))), llama[1])
    table[63, 31] += 1
    refused(change({"lm_head.weight": table}), "lm_head.weight unlike model.embed_tokens.weight")


def test_gpt2_is_read_under_the_names_it_was_published_with(tmp_path):
    preset, cfg = small("GPT2LMHeadModel")
    params = random_params(cfg)
    weights.save_pretrained(tmp_path, preset, cfg, params, layout="GPT2LMHeadModel")
    published = {
        name.removeprefix("transformer."): value for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    published |= {f"h.{i}.attn.bias": np.tri(40, dtype=np.float32)[None, None] for i in range(2)}
    save_file(published, tmp_path / "model.safetensors")
    assert_equal(params_of(weights.from_pretrained(tmp_path)), params)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
ONE = b'"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
TWICE = b"{" + ONE + b", " + ONE + b"}"


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({"a": F32}, b"", None),  # data beyond the end
        ({"a": F32}, bytes(12), None),  # bytes that no tensor has
        ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), None),  # overlap
        ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), None),  # a hole
        ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), None),
        ({"a": F32 | {"shape": [3]}}, bytes(8), None),
        ({"a": F32 | {"shape": [-2]}}, bytes(8), None),
        ({"a": F32 | {"shape": [2**62, 8]}}, bytes(8), None),
        ({"a": F32 | {"dtype": "F31"}}, bytes(8), None),
        (TWICE, bytes(1), None),
        (b'{"a": ', b"", None),
        (b'{"\xff": 1}', b"", None),
        (b"[" * 100_000, b"", None),
        (b"[]", b"", None),
        ({}, b"", 5_000),  # a header beyond the file
        ({}, b"", 100_000_001),  # over 100 MB
        ({}, b"", 2**63),
    ],
)
def test_a_file_made_to_deceive_is_refused(header, data, length, llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    write_raw(tmp_path / "model.safetensors", header, data, length)
    refused(tmp_path, "is no safetensors file|is no JSON that can be read")


@pytest.mark.parametrize("content", [b"", b"abc", b"\x80\x04K\x01."])
def test_a_file_too_short_for_a_header_is_refused(content, llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(content)
    refused(tmp_path, "is no safetensors file")


@pytest.fixture
def sharded(llama, tmp_path):
    """The small Llama in two files, and its index."""
    folder = tmp_path / "snapshots" / "main"
    model = weights.from_pretrained(llama[0])
    weights.save_pretrained(folder, model, layout="LlamaForCausalLM", max_shard_bytes=40_000)
    return folder, json.loads((folder / "model.safetensors.index.json").read_text())


@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "sub/{}", "..\\{}", "C:{}", "C:\\{}", "", ".", "..", "model.bin"])
def test_an_index_leads_nowhere_but_to_files_beside_it(name, sharded):
    folder, index = sharded
    first = min(index["weight_map"])
    index["weight_map"][first] = name.format(index["weight_map"][first])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "expected the plain name of a .safetensors file beside it")


def test_a_link_in_an_index_stays_in_the_folder_or_in_the_hubs_cache(sharded, llama):
    folder, index = sharded
    file = folder / min(index["weight_map"].values())
    blobs, outside = folder.parent.parent / "blobs", folder.parent.parent / "outside"
    for place in (blobs, outside):
        place.mkdir()
    os.rename(file, blobs / "0123abc")
    file.symlink_to("../../blobs/0123abc")
    assert_equal(params_of(weights.from_pretrained(folder)), llama[1])
    os.rename(blobs / "0123abc", outside / "0123abc")
    refused(folder, "which is not in")
    file.unlink()
    file.symlink_to("../../outside/0123abc")
    refused(folder, "a link out of")
    file.unlink()
    file.symlink_to(file.name)
    refused(folder, "which is not in")


def test_an_index_that_disagrees_with_its_files_is_refused(sharded):
    folder, index = sharded
    path, first = folder / "model.safetensors.index.json", min(index["weight_map"])
    path.write_text(json.dumps({"weight_map": {**index["weight_map"], "ghost": index["weight_map"][first]}}))
    refused(folder, "ghost is not in it")
    path.write_text(json.dumps({"weight_map": {k: v for k, v in index["weight_map"].items() if k != first}}))
    refused(folder, f"{first} is not listed")
    for content in ('{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"):
        path.write_text(content)
        refused(folder, "is no index")
    for content in ('{"weight_map": {}, "weight_map": {}}', "nonsense", '{"a":' * 100_000):
        path.write_text(content)
        refused(folder, "no JSON that can be read")
    path.write_text('{"weight_map": {}}')
    refused(folder, "missing model.embed_tokens.weight")
    (folder / "model.safetensors").write_bytes(b"")
    refused(folder, "holds both")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.ckpt"])
def test_pickles_are_refused_with_the_remedy(name, llama, tmp_path):
    (tmp_path / "config.json").write_bytes((llama[0] / "config.json").read_bytes())
    refused(tmp_path, "holds no model.safetensors")
    (tmp_path / name).write_bytes(b"\x80\x04K\x01.")
    refused(tmp_path, f"holds {name} and no model.safetensors: .*convert it to safetensors")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_type 'linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
        ({"hidden_size": "32"}, "hidden_size '32'"),
        ({"hidden_size": None}, "hidden_size None"),
        ({"num_attention_heads": True}, "num_attention_heads True"),
        ({"num_hidden_layers": 0}, "num_layers is 0"),
        ({"architectures": ["FalconForCausalLM"]}, "is of a FalconForCausalLM; known are .*LlamaForCausalLM"),
        ({"architectures": []}, "describes no model"),
        ({"architectures": [["LlamaForCausalLM"]]}, "describes no model"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "window is 0"),
        ({"architectures": ["Gemma2ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["chunked_attention"] * 2}, "layer_types"),
        ({"architectures": ["GPT2LMHeadModel"], "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse"),
        ({"model": {"name": "llama-nan"}}, "unknown model 'llama-nan'"),
        ({"model": {"name": ["a"]}}, "describes no model"),
        ({"model": 3}, "describes no model"),
    ],
)
def test_a_configuration_that_our_models_cannot_compute_is_refused_by_key(keys, message, change):
    refused(change(**keys), message)


@pytest.mark.parametrize("content", ["[]", "{", '{"model": {}, "model": {}}', "{}", "\x00"])
def test_a_configuration_that_is_none_is_refused(content, tmp_path):
    refused(tmp_path, "holds no config.json")
    (tmp_path / "config.json").write_text(content)
    refused(tmp_path, "describes no model")


def test_a_layout_refuses_a_model_that_it_has_no_words_for(tmp_path):
    cfg = models.preset("llama-nano", norm="layernorm")
    with pytest.raises(ValueError, match="norm is 'layernorm'; a LlamaForCausalLM has 'rmsnorm', write our own layout"):
        weights.save_pretrained(tmp_path, "llama-nano", cfg, random_params(cfg), layout="LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"no layout of another library holds this DecoderConfig: .*norm"):
        weights.save_pretrained(tmp_path, "llama-nano", cfg, random_params(cfg), layout="huggingface")
    with pytest.raises(
        ValueError, match="'FalconForCausalLM' does not hold a DecoderConfig; choose one of artifex, GPT2LM"
    ):
        weights.save_pretrained(tmp_path, "llama-nano", cfg, random_params(cfg), layout="FalconForCausalLM")
    assert list(tmp_path.iterdir()) == []
