"""Checkpoints in every form, and what the user reads where one cannot be used."""

import hashlib
import io
import json
import pickle
import socket
import sys
import threading

import pytest
import torch
from conftest import untrained_model

import encodec_tokenizer
from encodec_tokenizer import MODELS, SAMPLE_DIR, Settings, find_weights, load_model, resolve_device

SAMPLE = ["--dataset", "sample", "--max_samples", "1", "--target_duration", "0.5"]


def settings_of(name="encodec_24khz", weights="pretrained"):
    return resolve_device(Settings(model=name, weights=weights, device="cpu"))


def state_of(path):
    return torch.load(path, weights_only=True)


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch hub's folder of checkpoints, empty."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub_home"))
    return tmp_path / "hub_home" / "hub" / "checkpoints"


@pytest.fixture
def meta(tmp_path, monkeypatch, weights, cache):
    """Meta's server and its 24 kHz checkpoint, played by a folder and stand-in weights.

    Its name ends in the first 8 hex digits of its SHA-256, as those of Meta's files do.
    """
    content = weights("encodec_24khz").read_bytes()
    file = tmp_path / "server" / f"encodec-{hashlib.sha256(content).hexdigest()[:8]}.th"
    file.parent.mkdir()
    file.write_bytes(content)
    spec = MODELS["encodec_24khz"]._replace(checkpoint=file.name)
    monkeypatch.setitem(MODELS, "encodec_24khz", spec)
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", file.parent.as_uri() + "/")
    return file


@pytest.fixture
def no_server(tmp_path, monkeypatch, cache):
    """Meta's address cannot be reached."""
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", (tmp_path / "no_server").as_uri() + "/")


# -------------------------------------------------------------- pretrained and untrained weights


def test_pretrained_weights_are_downloaded_once_into_torch_hubs_cache(meta, cache, weights):
    path = find_weights(settings_of())
    assert path == cache / meta.name
    state = load_model(settings_of(), path)[0].state_dict()
    expected = state_of(weights("encodec_24khz"))
    assert all(state[name].equal(expected[name]) for name in expected)
    meta.unlink()
    assert find_weights(settings_of()) == path


def test_a_download_that_was_altered_is_refused(meta, cache, run):
    meta.write_bytes(meta.read_bytes()[:-1] + b"x")
    status, _, err = run(*SAMPLE, weights="pretrained")
    assert "invalid hash value" in err
    assert not list(cache.iterdir())
    assert status == 0 and "UNTRAINED" in err  # the sample goes on without


NO_DOWNLOAD = {  # what a server answers, by way of which proxy
    "nonsense": (b"nonsense\r\n\r\n", None),
    "a nonsense length": (b"HTTP/1.1 200 OK\r\nContent-Length: much\r\n\r\nx", None),
    "too little": (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", None),
    "a proxy's port": (b"", "http://proxy:port/"),
    "a proxy's scheme": (b"", "socks9://[::"),
    "a proxy's spaces": (b"", "http://a b/"),
}


@pytest.mark.parametrize("answer, proxy", NO_DOWNLOAD.values(), ids=NO_DOWNLOAD)
def test_a_download_that_fails_in_any_way_is_told(answer, proxy, cache, run, monkeypatch):
    def serve():
        connection, _ = server.accept()
        with connection:
            connection.recv(9999)
            connection.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=serve, daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        if proxy:
            monkeypatch.setenv("http_proxy", proxy)
        status, _, err = run("--audio_dir", SAMPLE_DIR, weights="pretrained")
    assert status == 2 and "could not be downloaded" in err and "--weights FILE" in err


@pytest.mark.parametrize(
    "words, is_memory",
    [
        ("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory", True),
        ("could not create a primitive", True),
        ("libtorch_cpu.so: failed to map segment from shared object", True),
        ("libtorch_cpu.so: cannot enable executable stack: Cannot allocate memory", True),
        ("CUDA out of memory. Tried to allocate 20.00 MiB.", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("libgomp.so.1: cannot allocate memory in static TLS block", False),  # not for want of it
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_too_little_memory_is_known_by_its_words(words, is_memory):
    assert encodec_tokenizer.is_out_of_memory(RuntimeError(words)) == is_memory


def test_a_failed_download_names_the_file_its_place_and_the_flag(
    tmp_path, cache, no_server, run, make_dataset, sound
):
    root = make_dataset({"a.wav": (sound(0.5), 44_100)})
    status, _, err = run("--input_dir", root, weights="pretrained")
    assert status == 2 and "Traceback" not in err
    assert str(cache / "encodec_24khz-d7cc33bc.th") in err and "could not be downloaded" in err
    assert "--weights FILE" in err and "--weights untrained" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["untrained", "pretrained"])
def test_untrained_weights_warn_wherever_they_are_used(given, tmp_path, no_server, run):
    """The sample alone falls back to them."""
    for _ in range(2):  # the second run encodes nothing
        status, _, err = run(*SAMPLE, weights=given)
        assert status == 0 and "WARNING: UNTRAINED WEIGHTS. These tokens are for testing" in err
    summary = (tmp_path / "out" / "summary_sample.txt").read_text()
    assert "WARNING: untrained weights. These tokens are for testing" in summary
    facts = json.loads((tmp_path / "out" / "tokenized_sample.json").read_text())
    assert facts["settings"]["weights"] == encodec_tokenizer.UNTRAINED
    with pytest.warns(UserWarning, match="untrained weights. These tokens are for testing"):
        encodec_tokenizer.load_encoder(Settings(dataset="sample", weights=given, device="cpu"))


@pytest.mark.parametrize("name", MODELS)
def test_untrained_weights_are_the_same_each_time(name):
    """And they leave the seed of other code alone."""
    before = torch.random.get_rng_state()
    first, second = (untrained_model(name).state_dict() for _ in range(2))
    assert all(first[key].equal(second[key]) for key in first)
    assert torch.random.get_rng_state().equal(before)
    assert first["quantizer.vq.layers.0._codebook.embed"].std() > 0


# ----------------------------------------------------------------------------- checkpoint files


def test_weights_that_cannot_be_used_end_in_one_sentence(tmp_path, weights, run):
    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'attacked')!r}, 'w')",)

    attack, state = Attack(), state_of(weights("encodec_24khz"))
    files = {
        "text.th": (b"no checkpoint", "is not a PyTorch checkpoint"),
        "text.safetensors": (b"no checkpoint", "is not a PyTorch checkpoint"),
        "attack.th": (pickle.dumps(attack, 2), "is not a PyTorch checkpoint"),
        "attack2.th": (saved({"encoder": attack}), "is not a PyTorch checkpoint"),
        "list.th": (saved([1, 2]), "of no EnCodec model"),
        "more.th": (saved({**state, "more": torch.zeros(1)}), "of no EnCodec model"),
        "fewer.th": (saved(dict(list(state.items())[1:])), "of no EnCodec model"),
        "encodec_24khz-d7cc33bc.th": (saved(state), "is damaged: its SHA-256 does not begin"),
    }
    cases = {tmp_path / "missing.th": "no such file", tmp_path: "no such file"}
    cases[weights("encodec_48khz")] = "those of encodec_48khz: add --model encodec_48khz"
    for name, (content, says) in files.items():
        (tmp_path / name).write_bytes(content)
        cases[tmp_path / name] = says
    for path, says in cases.items():
        status, _, err = run(*SAMPLE, weights=path)
        assert status == 2 and says in err and str(path) in err, (path, err)
        assert "Traceback" not in err
    assert not (tmp_path / "attacked").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, key, value",
    [
        ("encodec_24khz", "encoder.model.3.conv.conv.weight_v", float("nan")),
        ("encodec_48khz", "encoder.model.3.conv.conv.weight", float("inf")),
        ("encodec_24khz", "quantizer.vq.layers.7._codebook.embed", 0.0),
        ("encodec_48khz", "quantizer.vq.layers.0._codebook.embed", 0.0),
    ],
)
def test_weights_with_nan_or_empty_codebooks_are_refused(name, key, value, tmp_path, weights, run):
    """Codebooks are all zero in a model that was never trained."""
    state = state_of(weights(name))
    state[key][...] = value
    torch.save(state, tmp_path / "bad.th")
    status, _, err = run(*SAMPLE, "--model", name, weights=tmp_path / "bad.th")
    assert status == 2 and not (tmp_path / "out").exists()
    assert f"{tmp_path / 'bad.th'} are unusable: {key} has NaN or is all 0" in err


# --------------------------------------------------------------------------- Hugging Face's form

RENAMED = {  # parts of Meta's names -> transformers' (convert_encodec_checkpoint_to_pytorch.py)
    ".model.": ".layers.",
    ".conv.conv.": ".conv.",
    ".convtr.convtr.": ".conv.",
    ".conv.norm.": ".norm.",
    ".convtr.norm.": ".norm.",
    ".vq.layers.": ".layers.",
    "._codebook.": ".codebook.",
}
PARAMETRIZATIONS = {  # of newer versions
    "weight_g": "parametrizations.weight.original0",
    "weight_v": "parametrizations.weight.original1",
}


def renamed(state, parts):
    """The tensors of a state under other names."""
    made = {}
    for name, tensor in state.items():
        for old, new in parts.items():
            name = name.replace(old, new)
        made[name] = tensor.contiguous()
    assert len(made) == len(state)
    return made


@pytest.mark.parametrize(
    "name, parts",
    [
        ("encodec_24khz", RENAMED),
        ("encodec_24khz", RENAMED | PARAMETRIZATIONS),
        ("encodec_48khz", RENAMED),
    ],
)
def test_transformers_weights_are_the_same_weights(name, parts, weights, tmp_path):
    """In a folder, as model.safetensors, or in PyTorch's older form."""
    safetensors = pytest.importorskip("safetensors.torch")
    state = renamed(state_of(weights(name)), parts)
    assert {"decoder.layers.15.conv.bias", "quantizer.layers.9.codebook.embed"} <= set(state)
    safetensors.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    dated = tmp_path / "model-20261123.bin"  # only Meta's own two names promise a checksum
    torch.save(state, dated)
    model, digest = load_model(settings_of(name), weights(name))
    for given in (tmp_path, dated):
        settings = settings_of(name, given)
        other, same = load_model(settings, find_weights(settings))
        assert same == digest
        for mine, theirs in zip(other.state_dict().values(), model.state_dict().values()):
            assert mine.equal(theirs)
    state["encoder.layers.0.conv.bias"][0] += 1e-3
    torch.save(state, dated)
    assert load_model(settings_of(name), dated)[1] != digest


def test_without_safetensors_the_error_says_what_to_install(monkeypatch, run, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    status, _, err = run(*SAMPLE, weights=tmp_path)
    assert status == 2 and "pip install safetensors" in err and "Traceback" not in err
