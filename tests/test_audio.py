import os
import struct

import numpy as np
import pytest
import reference
import soundfile
import torch

from encodec_tokenizer import BadClip, clip_path, load_clip, resampler


def model_audio(path, rate, channels):
    samples, file_rate, _ = load_clip(path, channels, 600)
    return resampler(file_rate, rate, "cpu")(samples)


@pytest.mark.parametrize("model_rate, model_channels", [(24_000, 1), (48_000, 2)])
@pytest.mark.parametrize("channels", range(1, 9))
@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_and_one_to_eight_channels(
    rate, channels, model_rate, model_channels, tmp_path, sound
):
    path = tmp_path / "a.wav"
    soundfile.write(path, sound(0.25, rate, channels), rate, subtype="FLOAT")
    ours, theirs = (
        model_audio(path, model_rate, model_channels),
        reference.load(path, model_rate, model_channels),
    )
    assert ours.shape == theirs.shape
    assert ours.shape[0] == model_channels
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["a.flac", "a.ogg", "a.mp3", "a.aiff"])
def test_other_formats_are_read(name, tmp_path, sound):
    soundfile.write(tmp_path / name, sound(0.5), 44_100)
    samples, rate, duration_s = load_clip(tmp_path / name, 1, 600)
    assert rate == 44_100 and duration_s == samples.shape[1] / rate
    assert duration_s == pytest.approx(0.5, abs=0.06)


def test_a_long_file_is_read_whole_in_pieces(tmp_path):
    samples = np.linspace(-1, 1, 2**21 + 17)[:, None].repeat(2, axis=1)
    soundfile.write(tmp_path / "a.wav", samples, 44_100, subtype="FLOAT")
    ours, _, _ = load_clip(tmp_path / "a.wav", 2, 600)
    assert np.array_equal(ours.numpy().T, samples.astype(np.float32))


@pytest.mark.parametrize("rate", [11_127, 44_056, 44_101, 47_999, 23_999])
def test_an_odd_rate_takes_little_memory_and_keeps_the_pitch(rate):
    kernel = getattr(resampler(rate, 24_000, "cpu"), "kernel", torch.empty(0))  # none for 1:1
    assert kernel.numel() < 2**23
    t = torch.arange(rate) / rate
    out = resampler(rate, 24_000, "cpu")(torch.sin(2 * torch.pi * 440 * t)[None])
    assert out.shape[1] == pytest.approx(24_000, rel=2.5e-4)
    crossings = (out[0, 1:] * out[0, :-1] < 0).sum().item()
    assert crossings == pytest.approx(880, abs=2)


def write_bad_clips(folder, sound):
    """name -> what its reason must say"""
    good = folder / "good.wav"
    soundfile.write(good, sound(1.0), 44_100)
    whole = good.read_bytes()
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "no_samples.wav", np.zeros(0), 44_100)
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    soundfile.write(folder / "whole.flac", sound(1.0), 44_100)
    (folder / "truncated.flac").write_bytes((folder / "whole.flac").read_bytes()[:9000])
    (folder / "text.wav").write_text("This is not audio." * 99)
    for name, value in {"nan": np.nan, "infinite": np.inf, "absurd": 3e38}.items():
        samples = sound(1.0).astype(np.float32)
        samples[500] = value
        soundfile.write(folder / f"{name}.wav", samples, 44_100, subtype="FLOAT")
    (folder / "folder.wav").mkdir()
    os.mkfifo(folder / "pipe.wav")
    data = bytearray(whole)
    data[24:28] = struct.pack("<I", 2**31 - 1)
    (folder / "rate.wav").write_bytes(data)
    return {
        "missing.wav": "no such file in audio/",
        "empty.wav": "empty file (0 bytes)",
        "no_samples.wav": "no samples",
        "truncated.wav": "truncated: 44078 of 88200 bytes",
        "truncated.flac": "not audio that can be read (soundfile:",
        "text.wav": "not audio that can be read (soundfile:",
        "nan.wav": "NaN, infinite or absurdly large",
        "infinite.wav": "NaN, infinite or absurdly large",
        "absurd.wav": "NaN, infinite or absurdly large",
        "folder.wav": "not a plain file",
        "pipe.wav": "not a plain file",
        "rate.wav": "2147483647 Hz is not plausible",
        "": "the name is empty",
        "../good.wav": "leads outside the audio folder; not opened",
        "a/../../good.wav": "leads outside the audio folder; not opened",
        "/etc/hostname": "leads outside the audio folder; not opened",
        "C:\\clip.wav": "leads outside the audio folder; not opened",
        "..\\good.wav": "leads outside the audio folder; not opened",
        "nul\0.wav": "no such file",
        "long" * 100 + ".wav": "cannot be opened",
    }


def test_every_bad_clip_has_a_reason_that_a_person_understands(tmp_path, sound):
    folder = tmp_path / "audio"
    folder.mkdir()
    for name, says in write_bad_clips(folder, sound).items():
        with pytest.raises(BadClip) as reason:
            load_clip(clip_path(folder, name), 1, 600)
        assert says in str(reason.value), name
        assert "\n" not in str(reason.value)
    load_clip(clip_path(folder, "good.wav"), 1, 600)


def test_what_neither_library_reads_carries_both_messages(tmp_path):
    (tmp_path / "a.wav").write_text("no audio" * 50)
    with pytest.raises(BadClip, match=r"soundfile: .*Format not recognised.*torchaudio: "):
        load_clip(tmp_path / "a.wav", 1, 600)


def test_torchaudio_reads_what_soundfile_does_not(tmp_path, monkeypatch):
    (tmp_path / "a.m4a").write_text("no audio for soundfile" * 50)
    decoded = torch.stack([torch.ones(8_000), torch.zeros(8_000)])
    monkeypatch.setattr("torchaudio.load", lambda path: (decoded, 16_000))
    samples, rate, duration_s = load_clip(tmp_path / "a.m4a", 1, 600)
    assert (rate, duration_s) == (16_000, 0.5)
    assert samples.eq(0.5).all()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_a_bad_clip(tmp_path, sound):
    soundfile.write(tmp_path / "a.wav", sound(0.1), 44_100)
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(BadClip, match="can"):
        load_clip(clip_path(tmp_path, "a.wav"), 1, 600)


def test_a_stream_of_unknown_length_is_no_truncated_file(tmp_path, sound):
    """ffmpeg leaves sizes of 0xFFFFFFFF where it writes to a pipe."""
    soundfile.write(tmp_path / "a.wav", sound(0.5), 44_100)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert load_clip(tmp_path / "a.wav", 1, 600)[2] == 0.5


def test_a_clip_beyond_max_duration_is_refused_before_it_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(44_100 * 3), 44_100)
    with pytest.raises(BadClip, match="3 s long, --max_duration is 2 s"):
        load_clip(tmp_path / "a.wav", 1, 2.0)
