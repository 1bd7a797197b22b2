"""Checkpoints in every form, and what the user reads where one cannot be used."""

import hashlib
import json
import pickle
import sys

import pytest
import torch

import encodec_tokenizer
from encodec_tokenizer import MODELS, find_weights, load_model, parse_settings, resolve_device


def named_by_checksum(source, folder, stem="encodec"):
    """A copy of a file with the first 8 hex digits of its SHA-256 in its name, as Meta's have."""
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    copy = folder / f"{stem}-{checksum}.th"
    copy.write_bytes(source.read_bytes())
    return copy


def settings_of(*flags):
    return resolve_device(parse_settings(["--device", "cpu", *map(str, flags)]))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch hub's folder of checkpoints, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    return tmp_path / "hub_home" / "hub" / "checkpoints"


@pytest.fixture
def meta(tmp_path, monkeypatch, weights, cache):
    """Meta's server and its 24 kHz checkpoint, played by a folder and stand-in weights."""
    server = tmp_path / "server"
    server.mkdir()
    file = named_by_checksum(weights("encodec_24khz"), server)
    spec = MODELS["encodec_24khz"]._replace(checkpoint=file.name)
    monkeypatch.setitem(MODELS, "encodec_24khz", spec)
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", server.as_uri() + "/")
    return file


@pytest.fixture
def no_server(tmp_path, monkeypatch, cache):
    """Meta's address cannot be reached."""
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", (tmp_path / "no_server").as_uri() + "/")


def test_pretrained_weights_are_downloaded_once_into_torch_hubs_cache(meta, cache, weights):
    settings = settings_of()
    path = find_weights(settings)
    assert path == cache / meta.name
    state = load_model(settings, path)[0].state_dict()
    expected = torch.load(weights("encodec_24khz"), weights_only=True)
    assert all(state[name].equal(expected[name]) for name in expected)
    meta.unlink()
    assert find_weights(settings) == path


def test_a_download_that_was_altered_is_refused(meta, cache, run):
    meta.write_bytes(meta.read_bytes()[:-1] + b"x")
    status, _, err = run("--dataset", "sample", "--max_samples", "1", weights="pretrained")
    assert "invalid hash value" in err
    assert not (cache / meta.name).exists()
    assert status == 0 and "UNTRAINED" in err  # the sample goes on without


def test_damaged_cache_fails_its_checksum(meta, cache, run):
    cache.mkdir(parents=True)
    (cache / meta.name).write_bytes(b"half a file")
    status, _, err = run("--dataset", "sample", weights="pretrained")
    assert status == 2
    assert "is damaged" in err and str(cache / meta.name) in err


def test_a_failed_download_names_the_file_its_place_and_the_flag(
    tmp_path, cache, no_server, run, make_dataset, sound
):
    root = make_dataset({"a.wav": (sound(0.5), 44_100)})
    status, _, err = run("--input_dir", root, weights="pretrained")
    assert status == 2
    assert str(cache / "encodec_24khz-d7cc33bc.th") in err
    assert "--weights FILE" in err and "could not be downloaded" in err
    assert "--weights untrained" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_only_the_sample_falls_back_to_untrained_weights_and_says_so(tmp_path, no_server, run):
    flags = ["--dataset", "sample", "--max_samples", "1"]
    status, _, err = run(*flags, weights="pretrained")
    assert status == 0 and "WARNING: UNTRAINED WEIGHTS" in err
    assert "WARNING: untrained weights" in (tmp_path / "out/summary_sample.txt").read_text()
    assert '"weights": "untrained' in (tmp_path / "out/tokenized_sample.json").read_text()
    assert "WARNING: UNTRAINED WEIGHTS" in run(*flags, weights="pretrained")[2]  # each time


def bad_weights(tmp_path, weights):
    (tmp_path / "text.th").write_text("no checkpoint")
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.th")
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.th")
    state = torch.load(weights("encodec_24khz"), weights_only=True)
    torch.save({**state, "one.more": torch.zeros(1)}, tmp_path / "more.th")
    wrong = tmp_path / "encodec_24khz-d7cc33bc.th"
    wrong.write_bytes(weights("encodec_24khz").read_bytes())
    return {
        tmp_path / "missing.th": "no such file",
        tmp_path: "no such file",
        tmp_path / "text.th": "is not a PyTorch checkpoint",
        tmp_path / "text.safetensors": "is not a PyTorch checkpoint",
        tmp_path / "list.th": "of no EnCodec model",
        tmp_path / "other.th": "of no EnCodec model",
        tmp_path / "more.th": "of no EnCodec model",
        weights("encodec_48khz"): "those of encodec_48khz: add --model encodec_48khz",
        wrong: "is damaged: its SHA-256 begins with",
    }


def test_weights_that_cannot_be_used_end_in_one_sentence(tmp_path, weights, run):
    for path, says in bad_weights(tmp_path, weights).items():
        status, _, err = run("--dataset", "sample", weights=path)
        assert status == 2, path
        assert says in err and str(path) in err
        assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_eight_digits_in_a_files_name_may_be_a_date(tmp_path, weights):
    """Only Meta's own two names promise a checksum."""
    dated = tmp_path / "model-20261123.th"
    dated.write_bytes(weights("encodec_24khz").read_bytes())
    assert find_weights(settings_of("--weights", dated)) == dated


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_weights_with_nan_or_empty_codebooks_are_refused(name, value, tmp_path, weights, run):
    """NaN in a convolution; codebooks that are all zero, as of a model that was never trained."""
    state = torch.load(weights(name), weights_only=True)
    if value == 0:
        for key in state:
            state[key] *= not key.endswith("_codebook.embed")
    else:
        weight = "weight_v" if name == "encodec_24khz" else "weight"
        state[f"encoder.model.3.conv.conv.{weight}"][0, 0, 0] = value
    torch.save(state, tmp_path / "bad.th")
    status, _, err = run("--dataset", "sample", "--model", name, weights=tmp_path / "bad.th")
    assert status == 2
    assert str(tmp_path / "bad.th") in err and "NaN or is all 0" in err
    assert not list((tmp_path / "out").glob("*"))


def test_a_checkpoint_cannot_run_code(tmp_path, run):
    class Attack:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'attacked')!r}, 'w')",))

    (tmp_path / "attack.th").write_bytes(pickle.dumps(Attack()))
    torch.save({"encoder": Attack()}, tmp_path / "attack2.th")
    for name in ("attack.th", "attack2.th"):
        status, _, err = run("--dataset", "sample", weights=tmp_path / name)
        assert status == 2 and "is not a PyTorch checkpoint" in err
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("name", MODELS)
def test_untrained_weights_are_the_same_each_time(name, monkeypatch):
    """And they leave the seed of other code alone."""
    conftest = sys.modules["conftest"]
    monkeypatch.setattr(encodec_tokenizer, "untrained_model", conftest.untrained_of_its_own)
    settings = settings_of("--model", name)
    before = torch.random.get_rng_state()
    first, second = (load_model(settings, None)[0].state_dict() for _ in range(2))
    assert all(first[key].equal(second[key]) for key in first)
    assert torch.random.get_rng_state().equal(before)
    assert first["quantizer.vq.layers.0._codebook.embed"].std() > 0


# ------------------------------------------------------------------------- Hugging Face's form

# The modules of EnCodec's two halves, Meta's name -> transformers', as its conversion script
# (convert_encodec_checkpoint_to_pytorch.py) lists them. Written out: the script derives them.
HALVES = """
encoder.model.0.conv.conv encoder.layers.0.conv
encoder.model.1.block.1.conv.conv encoder.layers.1.block.1.conv
encoder.model.1.block.3.conv.conv encoder.layers.1.block.3.conv
encoder.model.1.shortcut.conv.conv encoder.layers.1.shortcut.conv
encoder.model.3.conv.conv encoder.layers.3.conv
encoder.model.4.block.1.conv.conv encoder.layers.4.block.1.conv
encoder.model.4.block.3.conv.conv encoder.layers.4.block.3.conv
encoder.model.4.shortcut.conv.conv encoder.layers.4.shortcut.conv
encoder.model.6.conv.conv encoder.layers.6.conv
encoder.model.7.block.1.conv.conv encoder.layers.7.block.1.conv
encoder.model.7.block.3.conv.conv encoder.layers.7.block.3.conv
encoder.model.7.shortcut.conv.conv encoder.layers.7.shortcut.conv
encoder.model.9.conv.conv encoder.layers.9.conv
encoder.model.10.block.1.conv.conv encoder.layers.10.block.1.conv
encoder.model.10.block.3.conv.conv encoder.layers.10.block.3.conv
encoder.model.10.shortcut.conv.conv encoder.layers.10.shortcut.conv
encoder.model.12.conv.conv encoder.layers.12.conv
encoder.model.13.lstm encoder.layers.13.lstm
encoder.model.15.conv.conv encoder.layers.15.conv
decoder.model.0.conv.conv decoder.layers.0.conv
decoder.model.1.lstm decoder.layers.1.lstm
decoder.model.3.convtr.convtr decoder.layers.3.conv
decoder.model.4.block.1.conv.conv decoder.layers.4.block.1.conv
decoder.model.4.block.3.conv.conv decoder.layers.4.block.3.conv
decoder.model.4.shortcut.conv.conv decoder.layers.4.shortcut.conv
decoder.model.6.convtr.convtr decoder.layers.6.conv
decoder.model.7.block.1.conv.conv decoder.layers.7.block.1.conv
decoder.model.7.block.3.conv.conv decoder.layers.7.block.3.conv
decoder.model.7.shortcut.conv.conv decoder.layers.7.shortcut.conv
decoder.model.9.convtr.convtr decoder.layers.9.conv
decoder.model.10.block.1.conv.conv decoder.layers.10.block.1.conv
decoder.model.10.block.3.conv.conv decoder.layers.10.block.3.conv
decoder.model.10.shortcut.conv.conv decoder.layers.10.shortcut.conv
decoder.model.12.convtr.convtr decoder.layers.12.conv
decoder.model.13.block.1.conv.conv decoder.layers.13.block.1.conv
decoder.model.13.block.3.conv.conv decoder.layers.13.block.3.conv
decoder.model.13.shortcut.conv.conv decoder.layers.13.shortcut.conv
decoder.model.15.conv.conv decoder.layers.15.conv
"""


def as_transformers(state, newer):
    """EnCodec's tensors under transformers' names; `newer`: as PyTorch's parametrizations."""
    modules = dict(line.split() for line in HALVES.strip().splitlines())
    for meta, theirs in list(modules.items()):  # a convolution's norm (48 kHz) lies beside it
        if meta.endswith(("conv.conv", "convtr.convtr")):
            inner = "conv" if meta.endswith("conv.conv") else "convtr"
            modules[meta.removesuffix(inner) + "norm"] = theirs.removesuffix("conv") + "norm"
    modules |= {
        f"quantizer.vq.layers.{i}._codebook": f"quantizer.layers.{i}.codebook" for i in range(32)
    }
    norms = {"weight_g": "original0", "weight_v": "original1"}
    renamed = {}
    for name, tensor in state.items():
        module, _, leaf = name.rpartition(".")
        if newer and leaf in norms:
            leaf = f"parametrizations.weight.{norms[leaf]}"
        renamed[f"{modules[module]}.{leaf}"] = tensor
    return renamed


@pytest.fixture(
    params=[("encodec_24khz", False), ("encodec_24khz", True), ("encodec_48khz", False)],
    ids=["24 kHz, weight_g", "24 kHz, parametrizations", "48 kHz, no weight norm"],
)
def hugging_face(request, tmp_path, weights):
    """A model, its checkpoint by Meta's names, and the same as a folder of transformers'."""
    safetensors = pytest.importorskip("safetensors.torch")
    name, newer = request.param
    state = torch.load(weights(name), weights_only=True)
    folder = tmp_path / "transformers"
    folder.mkdir()
    renamed = {key: t.contiguous() for key, t in as_transformers(state, newer).items()}
    safetensors.save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "encodec"}')
    return name, weights(name), folder


def test_transformers_weights_give_the_same_rows_and_identity(hugging_face, run, tmp_path):
    name, checkpoint, folder = hugging_face
    flags = ["--dataset", "sample", "--max_samples", "3", "--model", name]
    forms = {"meta": checkpoint, "folder": folder, "file": folder / "model.safetensors"}
    files, digests = set(), set()
    for form, path in forms.items():
        out = tmp_path / form
        status, _, err = run(*flags, "--output_dir", out, weights=path)
        assert status == 0, err
        files.add((out / "tokenized_sample.csv").read_bytes())
        record = json.loads((out / "tokenized_sample.json").read_text())
        digests.add(record["settings"]["weights"])
    assert len(files) == len(digests) == 1
    # One form is another's run.
    status, out, _ = run(*flags, "--output_dir", tmp_path / "meta", weights=folder)
    assert status == 0 and "(0 encoded now, 3 already there)" in out


def test_transformers_older_file_is_read_too(tmp_path, weights):
    state = torch.load(weights("encodec_24khz"), weights_only=True)
    path = tmp_path / "pytorch_model.bin"
    torch.save(as_transformers(state, newer=False), path)
    settings = settings_of("--weights", path)
    assert find_weights(settings) == path
    ours, theirs = load_model(settings, path), load_model(settings, weights("encodec_24khz"))
    assert ours[1] == theirs[1]


def test_other_weights_are_another_run(tmp_path, weights, run):
    state = torch.load(weights("encodec_24khz"), weights_only=True)
    state["encoder.model.0.conv.conv.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.th")
    flags = ["--dataset", "sample", "--max_samples", "1"]
    assert run(*flags, weights=weights("encodec_24khz"))[0] == 0
    status, _, err = run(*flags, weights=tmp_path / "other.th")
    assert status == 2 and "--weights: " in err


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    status, _, err = run("--dataset", "sample", weights=tmp_path)
    assert status == 2
    assert "pip install safetensors" in err and "Traceback" not in err
