import hashlib
import pickle

import pytest
import torch

import encodec_tokenizer
from encodec_tokenizer import MODELS, ModelSpec, find_weights, load_model, parse_settings


def named_by_checksum(source, folder, stem="encodec"):
    """A copy of a file with the first 8 hex digits of its SHA-256 in its name, as Meta's have."""
    checksum = hashlib.sha256(source.read_bytes()).hexdigest()[:8]
    copy = folder / f"{stem}-{checksum}.th"
    copy.write_bytes(source.read_bytes())
    return copy


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
    spec = MODELS["encodec_24khz"]
    played = ModelSpec(spec.build, spec.sample_rate, spec.channels, spec.bandwidths_kbps, file.name)
    monkeypatch.setitem(MODELS, "encodec_24khz", played)
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", server.as_uri() + "/")
    return file


def test_pretrained_weights_are_downloaded_once_into_torch_hubs_cache(meta, cache, weights):
    settings = parse_settings(["--device", "cpu"])
    path = find_weights(settings)
    assert path == cache / meta.name
    state, expected = load_model(settings, path).state_dict(), torch.load(weights("encodec_24khz"))
    assert all(state[name].equal(expected[name]) for name in expected)
    meta.unlink()
    assert find_weights(settings) == path


def test_a_download_that_was_altered_is_refused(meta, cache, run):
    meta.write_bytes(meta.read_bytes()[:-1] + b"x")
    status, _, err = run("--dataset", "sample", weights="pretrained")
    assert "invalid hash value" in err
    assert not (cache / meta.name).exists()
    assert status == 0 and "UNTRAINED" in err  # the sample goes on without


def test_damaged_cache_fails_its_checksum(meta, cache, run):
    cache.mkdir(parents=True)
    (cache / meta.name).write_bytes(b"half a file")
    status, _, err = run("--dataset", "sample", weights="pretrained")
    assert status == 2
    assert "is damaged" in err and str(cache / meta.name) in err


def test_where_no_download_is_possible_the_error_names_the_file_its_place_and_the_flag(
    tmp_path, cache, monkeypatch, run, make_dataset, sound
):
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", (tmp_path / "no_server").as_uri() + "/")
    root = make_dataset({"a.wav": (sound(0.5), 44_100)})
    status, _, err = run("--input_dir", root, weights="pretrained")
    assert status == 2
    assert str(cache / "encodec_24khz-d7cc33bc.th") in err
    assert "--weights FILE" in err and "could not be downloaded" in err
    assert not (tmp_path / "out").exists()


def test_only_the_sample_falls_back_to_untrained_weights_and_says_so(
    tmp_path, cache, monkeypatch, run
):
    monkeypatch.setattr(encodec_tokenizer, "ROOT_URL", (tmp_path / "no_server").as_uri() + "/")
    status, _, err = run("--dataset", "sample", weights="pretrained")
    assert status == 0 and "WARNING: UNTRAINED WEIGHTS" in err
    assert "WARNING: untrained weights" in (tmp_path / "out/summary_sample.txt").read_text()
    assert '"weights": "untrained' in (tmp_path / "out/tokenized_sample.json").read_text()


def bad_weights(tmp_path, weights):
    (tmp_path / "text.th").write_text("no checkpoint")
    torch.save([1, 2], tmp_path / "list.th")
    torch.save({"layer": torch.zeros(3)}, tmp_path / "other.th")
    wrong = tmp_path / "encodec-00000000.th"
    wrong.write_bytes(weights("encodec_24khz").read_bytes())
    return {
        tmp_path / "missing.th": "no such file",
        tmp_path: "no such file",
        tmp_path / "text.th": "is not a PyTorch checkpoint",
        tmp_path / "list.th": "of no EnCodec model",
        tmp_path / "other.th": "of no EnCodec model",
        weights("encodec_48khz"): "those of encodec_48khz: add --model encodec_48khz",
        wrong: "is damaged: its SHA-256 begins with",
    }


def test_weights_that_cannot_be_used_end_at_once_with_one_sentence(tmp_path, weights, run):
    for path, says in bad_weights(tmp_path, weights).items():
        status, _, err = run("--dataset", "sample", weights=path)
        assert status == 2, path
        assert says in err and str(path) in err
        assert "Traceback" not in err
    assert not (tmp_path / "out" / "tokenized_sample.blocks").exists()


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
def test_untrained_weights_are_the_same_every_time_and_leave_the_seed_alone(name):
    settings = parse_settings(["--model", name, "--device", "cpu"])
    before = torch.random.get_rng_state()
    first, second = (load_model(settings, None).state_dict() for _ in range(2))
    assert all(first[key].equal(second[key]) for key in first)
    assert torch.random.get_rng_state().equal(before)
    assert first["quantizer.vq.layers.0._codebook.embed"].std() > 0
