"""Who owns which tensor, what a rank reads from disk, and how a bad checkpoint is refused before any process starts."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel

import dualparal.model.weights as loading
from dualparal import CheckpointError, Engine, PresetError, RequestError
from dualparal.model.headers import read_header
from dualparal.model.layout import Checkpoint
from dualparal.model.part_shapes import transformer_owners, transformer_shapes
from dualparal.model.parts import PARTS
from dualparal.model.stage import Stage
from dualparal.model.validation import validate
from dualparal.planning.layer_split import split_layers

# Ownership


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize("num_layers", [1, 2, 5])
def test_the_table_lists_the_real_modules_keys(num_layers: int, cross_attn_norm: bool) -> None:
    config = {"num_layers": num_layers, "cross_attn_norm": cross_attn_norm}
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 5, "text_dim": 7,
             "freq_dim": 8, "ffn_dim": 16, "patch_size": (1, 2, 4)}  # fmt: skip
    with torch.device("meta"):
        model = WanTransformer3DModel(**config, **sizes)
    assert set(transformer_owners(config)) == set(model.state_dict())
    assert transformer_shapes({**config, **sizes}) == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("ranks", range(1, 8))
def test_every_tensor_is_owned_exactly_once(tiny_sharded: Path, ranks: int) -> None:
    checkpoint = Checkpoint(tiny_sharded)
    owned: Counter[str] = Counter()
    for layers in split_layers(checkpoint.num_layers, ranks):
        stage = Stage(checkpoint, layers, dtype="float32", device="cpu")
        names = [name for name, _ in stage.models[0].named_parameters()]
        owned.update(names)
        held = {int(name.split(".")[1]) for name in names if name.startswith("blocks.")}
        assert held == set(layers)
    assert set(owned.values()) == {1}
    assert set(owned) == set(checkpoint.tensors("transformer"))


def test_the_loaded_values_are_the_files(tiny_sharded: Path) -> None:
    whole = WanTransformer3DModel.from_pretrained(tiny_sharded / "transformer").state_dict()
    checkpoint = Checkpoint(tiny_sharded)
    for layers in split_layers(7, 3, (1, 4, 2)):
        for name, value in Stage(checkpoint, layers, dtype="float32", device="cpu").models[0].named_parameters():
            assert value.device.type == "cpu", "nothing may be left on the meta device"
            assert torch.equal(value, whole[name]), name


def test_a_rank_opens_only_the_files_that_hold_its_tensors(tiny_sharded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_sharded)
    tensors = checkpoint.tensors("transformer")
    assert len({info.file for info in tensors.values()}) > 8, "the checkpoint is meant to have many shards"
    opened: list[Path] = []
    read: list[str] = []

    class Spy:
        def __init__(self, file: Path, framework: str) -> None:
            opened.append(Path(file))
            self._inner = real(file, framework=framework)

        def __enter__(self) -> Spy:
            self._inner = self._inner.__enter__()
            return self

        def __exit__(self, *error: Any) -> Any:
            return self._inner.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._inner.keys())

        def get_tensor(self, key: str) -> torch.Tensor:
            read.append(key)
            return self._inner.get_tensor(key)

    real = loading.safe_open
    monkeypatch.setattr(loading, "safe_open", Spy)
    owners = transformer_owners(checkpoint.config("transformer"))
    for layers in split_layers(7, 3):
        opened.clear()
        read.clear()
        Stage(checkpoint, layers, dtype="float32", device="cpu")
        mine = {k for k, o in owners.items() if o in layers or (o == -1 and layers.start == 0) or (o == 7 == layers.stop)}
        assert set(opened) == {tensors[key].file for key in mine}
        assert sorted(read) == sorted(mine)
        assert len(set(opened)) < len({info.file for info in tensors.values()})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_modules_that_upstream_keeps_in_float32(tiny: Path, dtype: str) -> None:
    upstream = WanTransformer3DModel.from_pretrained(tiny / "transformer", dtype=getattr(torch, dtype)).state_dict()
    dtypes = {value.dtype for value in upstream.values()}
    assert dtypes == {torch.float32, getattr(torch, dtype)}
    for layers in split_layers(4, 2):
        for name, value in Stage(Checkpoint(tiny), layers, dtype=dtype, device="cpu").models[0].named_parameters():
            assert value.dtype == upstream[name].dtype, name
            assert torch.equal(value, upstream[name]), name


# Splits


def test_even_splits() -> None:
    assert [len(layers) for layers in split_layers(30, 4)] == [8, 8, 7, 7]
    assert split_layers(4, 1) == (range(4),)
    assert split_layers(5, 2, (1, 4)) == (range(1), range(1, 5))


@pytest.mark.parametrize(
    ("ranks", "layer_split"), [(0, None), (5, None), (-1, None), (2, (4,)), (2, (4, 0)), (2, (1, 2)), (2, (5, -1)), (1, ())]
)
def test_impossible_splits(tiny: Path, ranks: int, layer_split: tuple[int, ...] | None) -> None:
    with pytest.raises(RequestError, match=r"ranks=|layer_split="):
        Engine(tiny, ranks=ranks, layer_split=layer_split, device="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"dtype": "float33"},
        {"device": "tpu"},
        {"threads": 0},
        {"ranks": True},
        {"ranks": 1.5},
        {"ranks": "2"},
    ],
)
def test_bad_engine_options(tiny: Path, options: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Engine(tiny, **{"device": "cpu", **options})


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", torch.bfloat16, "torch.bfloat16", "fp32", "fp16", "half", None])
def test_names_of_dtypes(tiny: Path, dtype: Any) -> None:
    assert Engine(tiny, device="cpu", dtype=dtype).dtype in ("float32", "bfloat16", "float16")


# Bad checkpoints


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def edit_json(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda found: found.update(values))


def drop_json(name: str, key: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / name, lambda found: found.pop(key))


def remove(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def write(name: str, data: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data) and None


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


def cut_last_byte(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 1)


def forge_header(name: str, header: Any) -> Callable[[Path], None]:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return lambda folder: (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 64) and None


def drop_tensor(name: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / name)
        del tensors[key]
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def reshape_tensor(name: str, key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / name)
        tensors[key] = tensors[key][:-1].clone()
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return change


def change_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / name)
        change(tensors)
        save_file(tensors, folder / name, metadata={"format": "pt"})

    return rewrite


def store_as(name: str, key: str, dtype: torch.dtype) -> Callable[[Path], None]:
    return change_tensors(name, lambda tensors: tensors.update({key: tensors[key].to(dtype)}))


def add_tensor(name: str, key: str) -> Callable[[Path], None]:
    return change_tensors(name, lambda tensors: tensors.update({key: torch.ones(1)}))


def slow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"x")


def only_pickled(folder: Path) -> None:
    (folder / DIT).unlink()
    (folder / "transformer" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def text_encoder_pickled(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


DIT = "transformer/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CONFIG = "transformer/config.json"
VAE_CONFIG, SCHEDULER = "vae/config.json", "scheduler/scheduler_config.json"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model_index.json": (remove("model_index.json"), "model_index.json"),
    "no transformer": (remove("transformer"), "transformer"),
    "no transformer config": (remove(CONFIG), "config.json"),
    "no transformer weights": (remove(DIT), "incomplete"),
    "no vae": (remove("vae"), "vae"),
    "no vae weights": (remove(VAE), "incomplete"),
    "no text encoder": (remove("text_encoder"), "text_encoder"),
    "no text encoder weights": (remove("text_encoder/model.safetensors"), "incomplete"),
    "no tokenizer": (remove("tokenizer"), "tokenizer"),
    "no tokenizer file": (remove("tokenizer/tokenizer.json"), "tokenizer"),
    "a slow tokenizer": (slow_tokenizer, r"has no tokenizer\.json \(there is spiece\.model"),
    "no scheduler": (remove("scheduler"), "scheduler"),
    "index is not JSON": (write("model_index.json", b"<html>not found</html>"), "not JSON"),
    "index is not UTF-8": (write("model_index.json", b"\xff\xfe\x00"), "not JSON"),
    "index is a list": (write("model_index.json", b"[]"), "JSON object"),
    "config is empty": (write(CONFIG, b""), "not JSON"),
    "config without layers": (drop_json(CONFIG, "num_layers"), "lacks blocks"),
    "config with a word for layers": (edit_json(CONFIG, num_layers="many"), "num_layers"),
    "config with no layers": (edit_json(CONFIG, num_layers=0), "num_layers"),
    "config with absurdly many layers": (edit_json(CONFIG, num_layers=10**9), "num_layers"),
    "config with more layers than the file": (edit_json(CONFIG, num_layers=5), r"lacks blocks\.4"),
    "config with fewer layers than the file": (edit_json(CONFIG, num_layers=3), "num_layers|layers"),
    "config of another width": (edit_json(CONFIG, num_attention_heads=4), "shape"),
    "config of another ffn": (edit_json(CONFIG, ffn_dim=64), "shape"),
    "transformer of another class": (edit_json(CONFIG, _class_name="FluxTransformer2DModel"), "FluxTransformer2DModel"),
    "vae of another class": (edit_json("vae/config.json", _class_name="AutoencoderKL"), "AutoencoderKL;"),
    "text encoder of another class": (edit_json("text_encoder/config.json", architectures=["T5Model"]), "T5Model"),
    "another scheduler": (edit_json("scheduler/scheduler_config.json", _class_name="DDIMScheduler"), "DDIMScheduler"),
    "a text encoder of absurdly many layers": (edit_json("text_encoder/config.json", num_layers=10**9), "num_layers=10000"),
    "a scheduler of no steps": (edit_json(SCHEDULER, num_train_timesteps=0), "num_train_timesteps=0"),
    "a scheduler of no order": (edit_json(SCHEDULER, solver_order=0), "solver_order=0"),
    "a scheduler that shifts by size": (edit_json(SCHEDULER, use_dynamic_shifting=True), "use_dynamic_shifting=True"),
    "a scheduler that predicts noise": (edit_json(SCHEDULER, predict_x0=False), "predict_x0=False, which this program"),
    "a scheduler within a scheduler": (edit_json(SCHEDULER, solver_p={"a": 1}), "solver_p="),
    "a scheduler of an unknown kind": (edit_json(SCHEDULER, solver_type="x"), "solver_type='x'"),
    "a scheduler of unknown spacing": (edit_json(SCHEDULER, timestep_spacing="x"), "timestep_spacing='x'"),
    "a scheduler of unknown end": (edit_json(SCHEDULER, final_sigmas_type="x"), "final_sigmas_type='x'"),
    "a scheduler of unknown betas": (edit_json(SCHEDULER, beta_schedule="x"), "beta_schedule='x'"),
    "a scheduler that needs scipy": (edit_json(SCHEDULER, use_beta_sigmas=True), "use_beta_sigmas=True"),
    "no shift": (edit_json(SCHEDULER, flow_shift=0), "flow_shift=0"),
    "a shift of text": (edit_json(SCHEDULER, flow_shift="3"), "flow_shift='3'"),
    "a shift that is none": (edit_json(SCHEDULER, flow_shift=None), "flow_shift=None"),
    "a vae without means": (drop_json(VAE_CONFIG, "latents_mean"), "no latents_mean of 4 numbers"),
    "a vae without deviations": (edit_json(VAE_CONFIG, latents_std=None), "no latents_std of 4 numbers"),
    "a vae with too few means": (edit_json(VAE_CONFIG, latents_mean=[0.0]), "no latents_mean of 4 numbers"),
    "a vae with a word for a mean": (edit_json(VAE_CONFIG, latents_mean=["a", 0, 0, 0]), "no latents_mean of 4 numbers"),
    "a vae of two frames a latent": (edit_json(VAE_CONFIG, temperal_downsample=[False, True, False]), "packs 2 frames"),
    "a vae of another size": (edit_json(VAE_CONFIG, scale_factor_spatial=16), "makes 8 pixels of a latent's and claims"),
    "a vae with alpha": (edit_json(VAE_CONFIG, out_channels=4), "gives 4 channels"),
    "a vae in 8 bits": (store_as(VAE, "decoder.conv_in.bias", torch.float8_e4m3fn), "conv_in.bias is stored as F8_E4M3"),
    "weights in whole numbers": (store_as(DIT, "blocks.1.ffn.net.2.weight", torch.int8), "net.2.weight is stored as I8"),
    "a text encoder in whole numbers": (store_as(TEXT, "shared.weight", torch.int8), r"shared\.weight is stored as I8"),
    "a surplus tensor": (add_tensor(DIT, "patch_embedding.weight_scale_2"), r"holds patch_embedding\.weight_scale_2"),
    "a surplus tensor of the vae": (add_tensor(VAE, "decoder.conv_in.weight_zero_point"), r"holds decoder\.conv_in\."),
    "a surplus tensor of the text encoder": (add_tensor(TEXT, "lm_head.bias"), r"holds lm_head\.bias"),
    "image to video": (edit_json(CONFIG, image_dim=1280, added_kv_proj_dim=24), "image-to-video"),
    "image to video of no width": (edit_json(CONFIG, added_kv_proj_dim=0), "image-to-video model .added_kv_proj_dim=0"),
    "image to video of Wan2.2": (edit_json(CONFIG, in_channels=36, out_channels=4), "=36, of which 32 for a picture"),
    "image to video by its pipeline": (edit_json("model_index.json", _class_name="WanImageToVideoPipeline"), "WanImageToVideo"),
    "norms per head": (edit_json(CONFIG, qk_norm="rms_norm"), "qk_norm='rms_norm'"),
    "config of another text encoder": (edit_json(CONFIG, text_dim=64), "shape|text_dim"),
    "another text encoder": (edit_json("text_encoder/config.json", d_model=64), "text_dim"),
    "another vae": (edit_json(VAE_CONFIG, z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16), "VAE has 16"),
    "nonsense in the index": (edit_json("model_index.json", transformer_2=5), "no sense"),
    "nonsense in the config": (edit_json(CONFIG, patch_size=7), "no sense"),
    "image to video by its channels": (edit_json(CONFIG, in_channels=9), "in_channels=9, of which 5 for a picture"),
    "patches of two frames": (edit_json(CONFIG, patch_size=[2, 2, 2]), "patch"),
    "second expert named but missing": (edit_json("model_index.json", transformer_2=["diffusers", "W"]), "transformer_2"),
    "a missing tensor": (drop_tensor(DIT, "blocks.2.attn1.to_k.weight"), r"blocks\.2\.attn1\.to_k\.weight"),
    "a tensor of another shape": (reshape_tensor(DIT, "blocks.1.ffn.net.2.bias"), r"blocks\.1\.ffn\.net\.2\.bias"),
    "a missing tensor of the vae": (drop_tensor(VAE, "decoder.conv_in.bias"), r"vae lacks decoder\.conv_in\.bias"),
    "a vae tensor of another shape": (reshape_tensor(VAE, "decoder.conv_out.bias"), r"decoder\.conv_out\.bias has shape"),
    "a vae config of another width": (edit_json("vae/config.json", base_dim=8), "has shape"),
    "a missing tensor of the text encoder": (drop_tensor(TEXT, "encoder.final_layer_norm.weight"), "final_layer_norm"),
    "a text encoder of more layers": (edit_json("text_encoder/config.json", num_layers=3), r"lacks encoder\.block\.2"),
    "no embedding table": (drop_tensor(TEXT, "shared.weight"), r"lacks shared\.weight"),
    "another vocabulary": (edit_json("text_encoder/config.json", vocab_size=301), r"shared\.weight has shape"),
    "empty file": (write(DIT, b""), "safetensors"),
    "seven bytes": (write(DIT, b"1234567"), "safetensors"),
    "half a file": (cut(DIT, 0.5), "cut off"),
    "a file one byte short": (cut_last_byte(DIT), "cut off"),
    "half a header": (cut(DIT, 0.005), "safetensors"),
    "half a vae": (cut(VAE, 0.5), "cut off"),
    "half a text encoder": (cut("text_encoder/model.safetensors", 0.5), "cut off"),
    "garbage": (write(DIT, b"\x93garbage" * 400), "safetensors"),
    "an HTML page": (write(DIT, b"<!DOCTYPE html><html>" * 50), "safetensors"),
    "a git lfs pointer": (write(DIT, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"), "safetensors"),
    "a header that is a list": (forge_header(DIT, []), "header"),
    "a header that is not JSON": (forge_header(DIT, b"{nonsense"), "header"),
    "a header of numbers": (forge_header(DIT, {"a": 1}), "header"),
    "a header of null": (forge_header(DIT, {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}), "header"),
    "a header without offsets": (forge_header(DIT, {"a": {"dtype": "F32", "shape": [1]}}), "header"),
    "a header with bad offsets": (forge_header(DIT, {"a": {"dtype": "F32", "shape": [1], "data_offsets": ["a"]}}), "header"),
    "a header with no offsets": (forge_header(DIT, {"a": {"dtype": "F32", "shape": [1], "data_offsets": []}}), "header"),
    "pickled weights": (only_pickled, r"\.bin"),
    "a pickled text encoder": (text_encoder_pickled, r"\.bin"),
    "weights are a folder": (lambda f: ((f / DIT).unlink(), (f / DIT).mkdir()), "safetensors"),
}  # fmt: skip


def assert_refused(folder: Path, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        Engine(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert str(folder) in message, "it does not say where"
    assert caught.value.__cause__ is None
    assert not [child for child in multiprocessing.active_children() if "dualparal" in child.name]


@pytest.mark.parametrize("name", list(BAD))
def test_bad_checkpoints(tiny: Path, tmp_path: Path, name: str) -> None:
    change, says = BAD[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    change(folder)
    assert_refused(folder, says)


INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


def point_outside(where: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.copy(next((folder / "transformer").glob("*-00001-*.safetensors")), folder / "stolen.safetensors")
        edit(folder / INDEX, lambda index: index["weight_map"].update({"proj_out.bias": where}))

    return change


BAD_SHARDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda f: sorted((f / "transformer").glob("*.safetensors"))[3].unlink(), "cannot be read"),
    "a shard is cut": (lambda f: cut_last_byte(str(sorted((f / "transformer").glob("*.safetensors"))[2]))(f), "cut off"),
    "no index": (remove(INDEX), "index"),
    "index without a map": (write(INDEX, b"{}"), "weight_map"),
    "index with an empty map": (write(INDEX, b'{"weight_map": {}}'), "lacks|weight_map"),
    "index with numbers": (edit_json(INDEX, weight_map={"a": 1, "b": "c.safetensors"}), "outside|weight_map"),
    "index with lists": (edit_json(INDEX, weight_map={"a": ["x"]}), "outside|weight_map"),
    "index names a file outside": (point_outside("../stolen.safetensors"), "outside"),
    "index names an absolute path": (point_outside("/etc/passwd"), "outside"),
    "index names the folder above": (point_outside(".."), "outside|cannot be read"),
    "index is pickled": (point_outside("weights.bin"), r"safetensors|cannot be read"),
    "index puts a tensor into the wrong shard": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"a.ghost": i["weight_map"]["proj_out.bias"]})), "ghost",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BAD_SHARDED))
def test_bad_sharded_checkpoints(tiny_sharded: Path, tmp_path: Path, name: str) -> None:
    change, says = BAD_SHARDED[name]
    folder = tmp_path / "model"
    shutil.copytree(tiny_sharded, folder)
    change(folder)
    assert_refused(folder, says)


def test_the_index_wins_over_a_stale_single_file(tiny_sharded: Path, tmp_path: Path) -> None:
    """As an update of a folder leaves it: shards with their index, and the single file from before. All parts, alike."""
    from diffusers import AutoencoderKLWan
    from safetensors.torch import load_file, save_file
    from transformers import UMT5EncoderModel

    from dualparal.model.weights import load_text_encoder, load_vae

    folder = Path(shutil.copytree(tiny_sharded, tmp_path / "model"))
    for part in ("transformer", "vae", "text_encoder"):
        where, stem = folder / part, PARTS[part].weights
        if part == "vae":
            AutoencoderKLWan.from_pretrained(tiny_sharded / part).save_pretrained(where, max_shard_size="20KB")
        if part == "text_encoder":
            UMT5EncoderModel.from_pretrained(tiny_sharded / part).save_pretrained(where, max_shard_size="20KB")
        shards = sorted(where.glob("*-of-*.safetensors"))
        assert len(shards) > 1 and (where / f"{stem}.safetensors.index.json").is_file()
        whole = {key: value for shard in shards for key, value in load_file(shard).items()}
        save_file({key: value + 1 for key, value in whole.items()}, where / f"{stem}.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(folder)
    validate(checkpoint)
    stage = Stage(checkpoint, range(7), dtype="float32", device="cpu").models[0]
    for model, real in (
        (stage, WanTransformer3DModel.from_pretrained(tiny_sharded / "transformer")),
        (load_vae(checkpoint, torch.float32), AutoencoderKLWan.from_pretrained(tiny_sharded / "vae")),
        (load_text_encoder(checkpoint, torch.float32), UMT5EncoderModel.from_pretrained(tiny_sharded / "text_encoder")),
    ):
        expected = real.state_dict()
        assert set(model.state_dict()) == set(expected)
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_whole_parts_equal_the_libraries(tiny: Path, tmp_path: Path, stored: str, dtype: str) -> None:
    """Loaded tensor by tensor, from either name of the embedding table, and the same bits and types."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    from dualparal.model.weights import load_text_encoder, load_vae

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    for name in (VAE, TEXT):
        change_tensors(name, lambda ts: ts.update({key: x.to(getattr(torch, stored)) for key, x in ts.items()}))(folder)
    real = UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=getattr(torch, dtype)).state_dict()
    for _ in range(2):
        found = load_text_encoder(Checkpoint(folder), getattr(torch, dtype)).state_dict()
        assert {key: x.dtype for key, x in found.items()} == {key: x.dtype for key, x in real.items()}
        assert set(found) == set(real) and all(torch.equal(found[key], x) for key, x in real.items())
        names = {"shared.weight": "encoder.embed_tokens.weight"}
        change_tensors(TEXT, lambda ts, to=names: ts.update({to.get(key, key): ts.pop(key) for key in list(ts)}))(folder)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=getattr(torch, dtype)).state_dict()
    loaded = load_vae(Checkpoint(folder), getattr(torch, dtype)).state_dict()
    assert set(loaded) == set(vae) and all(
        torch.equal(loaded[key], x) and loaded[key].dtype == x.dtype for key, x in vae.items()
    )


def test_a_vae_of_another_kind_is_named_by_its_loader(tiny: Path, tmp_path: Path) -> None:
    from dualparal.model.weights import load_vae

    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit_json(VAE_CONFIG, is_residual=True, decoder_base_dim=4)(folder)
    with pytest.raises(CheckpointError, match=r"vae (lacks|holds)") as caught:
        load_vae(Checkpoint(folder), torch.float32)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_with_the_vae_of_another(tiny_ti2v: Path, tiny: Path, tmp_path: Path) -> None:
    validate(Checkpoint(tiny_ti2v))
    assert Checkpoint(tiny_ti2v).latent_sizes == (4, 16)
    folder = Path(shutil.copytree(tiny_ti2v, tmp_path / "model"))
    edit_json(VAE_CONFIG, is_residual=False)(folder)
    assert_refused(folder, r"vae lacks decoder\.up_blocks\.0\.upsamplers")
    edit_json(VAE_CONFIG, is_residual=True, patch_size=1, out_channels=3)(folder)
    assert_refused(folder, "makes 8 pixels of a latent's and claims")
    shutil.rmtree(folder / "vae")
    shutil.copytree(tiny / "vae", folder / "vae")
    validate(Checkpoint(folder))


def test_the_checkpoints_own_shift(tiny: Path, tmp_path: Path) -> None:
    assert Checkpoint(tiny).flow_shift == 3.0
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    edit_json(SCHEDULER, flow_shift=7.5)(folder)
    assert Checkpoint(folder).flow_shift == 7.5
    drop_json(SCHEDULER, "flow_shift")(folder)
    assert Checkpoint(folder).flow_shift is None


def test_bad_second_expert(tiny_two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_two, folder)
    cut_last_byte("transformer_2/diffusion_pytorch_model.safetensors")(folder)
    assert_refused(folder, "transformer_2")
    shutil.rmtree(folder / "transformer_2")
    assert_refused(folder, "transformer_2")


def test_two_experts_that_do_not_fit_each_other(tiny_two: Path, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_two, folder)
    shutil.rmtree(folder / "transformer_2")
    shutil.copytree(tiny / "transformer", folder / "transformer_2")
    assert_refused(folder, "layers")


def test_no_such_model(tmp_path: Path) -> None:
    assert_refused_name = pytest.raises((CheckpointError, PresetError))
    for name in (
        str(tmp_path / "nothing here"),
        "./nothing",
        "~/nothing/at/all",
        "a/b/c",
        "no-such-preset",
        "",
        "x" * 300,
        "a\0b",
    ):
        with assert_refused_name as caught:
            Engine(name, device="cpu")
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", "model_index.json")
    (tmp_path / "file").write_text("hello")
    with assert_refused_name:
        Engine(tmp_path / "file", device="cpu")


def test_a_header_is_read_without_its_weights(tiny: Path) -> None:
    found = read_header(tiny / DIT)
    assert found["proj_out.weight"].shape == (16, 24)
    assert {info.dtype for info in found.values()} == {"F32"}
