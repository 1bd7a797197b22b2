"""Weights that behave like trained ones, for tests and benchmarks: python tests/standin.py FOLDER

The pretrained checkpoints cannot be had everywhere, and a fresh EnCodec is no substitute: its
codebooks are all zero, and its latents hardly vary, so that rounding decides the tokens. Here every
convolution is scaled to an output of unit deviation on varied audio, and every codebook is filled
with what the ones before it left of the latents of other audio, near-duplicates left out.
"""

import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from encodec import EncodecModel

BUILD = {
    "encodec_24khz": EncodecModel.encodec_model_24khz,
    "encodec_48khz": EncodecModel.encodec_model_48khz,
}


def plain_model(name: str, weights: Path | None = None) -> EncodecModel:
    """Meta's model as it comes, with the weights of a file where one is given."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = BUILD[name](pretrained=False)
    if weights:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def varied_audio(rate: int, channels: int, seconds: int, seed: int) -> torch.Tensor:
    """[seconds, channels, rate]: noises, glides, bursts and rumbles, a second of each in turn."""
    rng = np.random.default_rng(seed)
    t = np.arange(rate) / rate

    def noise() -> np.ndarray:
        return rng.standard_normal(rate) * np.exp(rng.uniform(-5, 0))

    def glides() -> np.ndarray:
        hz = np.exp(rng.uniform(np.log(60), np.log(8000), 4))[:, None]
        bend, phase = rng.uniform(-0.3, 0.3, (4, 1)), rng.uniform(0, 6, (4, 1))
        return rng.uniform(0.02, 0.25) * np.sin(2 * np.pi * hz * t * (1 + bend * t) + phase).sum(0)

    def bursts() -> np.ndarray:
        x = np.zeros(rate)
        for start in rng.integers(0, rate - 10, 12):
            rest = rate - start
            fade = np.exp(-np.arange(rest) / rate * rng.uniform(5, 80))
            x[start:] += rng.uniform(0.1, 0.8) * fade * rng.standard_normal(rest)
        return x

    def rumble() -> np.ndarray:
        x = np.cumsum(rng.standard_normal(rate))
        x = (x - x.mean()) / np.abs(x).max()
        return rng.uniform(0.1, 1) * x * np.abs(np.sin(2 * np.pi * rng.uniform(1, 9) * t))

    kinds = (noise, glides, bursts, rumble)
    mono = np.stack([kinds[i % 4]() for i in range(seconds)]).astype(np.float32)
    audio = torch.from_numpy(mono)[:, None]
    return audio if channels == 1 else torch.cat([audio, 0.3 * audio + 0.7 * audio.roll(1, 0)], 1)


@torch.no_grad()
def stand_in(
    name: str, num_codebooks: int = 32, num_frames: int = 1500, scale_s: int = 40, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A state dict for the model of that name. Takes some 20 s; less with smaller numbers.

    `scale_s` seconds of audio scale the convolutions, `num_frames` frames fill a codebook. The
    codebooks beyond `num_codebooks` are noise of the deviation that those before them leave.
    """
    torch.manual_seed(seed)
    model = plain_model(name)

    def normalized(audio: torch.Tensor) -> torch.Tensor:
        mono = audio.mean(1, keepdim=True)
        volume = 1e-8 + mono.pow(2).mean(2, keepdim=True).sqrt()
        return audio / volume if model.normalize else audio

    def to_unit_deviation(module, _, output):
        deviation = output.std()
        gain = module.weight_g if hasattr(module, "weight_g") else module.weight
        gain.div_(deviation)
        module.bias.div_(deviation)
        return output / deviation

    convolutions = [m for m in model.encoder.modules() if isinstance(m, torch.nn.Conv1d)]
    hooks = [module.register_forward_hook(to_unit_deviation) for module in convolutions]
    model.encoder(normalized(varied_audio(model.sample_rate, model.channels, scale_s, seed)))
    for hook in hooks:
        hook.remove()

    layers = model.quantizer.vq.layers[:num_codebooks]
    seconds = -(-len(layers) * num_frames // model.frame_rate)
    audio = normalized(varied_audio(model.sample_rate, model.channels, int(seconds), seed + 1))
    latents = torch.cat([model.encoder(second[None])[0].T for second in audio])
    parts = latents[torch.randperm(len(latents))].split(num_frames)
    for i, layer in enumerate(layers):
        residual = parts[i]
        for earlier in layers[:i]:
            residual = residual - earlier.codebook[earlier.encode(residual.T[None])[0]]
        distances = torch.cdist(residual, residual)
        apart = 0.15 * residual.std() * residual.shape[1] ** 0.5
        free, stored = torch.ones(len(residual), dtype=torch.bool), []
        for j in range(len(residual)):
            if free[j] and len(stored) < len(layer.codebook):
                stored.append(j)
                free &= distances[j] >= apart
        layer.codebook.fill_(1e3)  # out of reach of any latent
        layer.codebook[: len(stored)] = residual[stored]
    residual = parts[0]
    for i, layer in enumerate(model.quantizer.vq.layers):
        if i >= num_codebooks:
            noise = torch.randn(layer.codebook.shape)
            layer.codebook.copy_(residual.mean(0) + 0.5 * residual.std(0) * noise)
        residual = residual - layer.codebook[layer.encode(residual.T[None])[0]]
    return model.state_dict()


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for model_name in BUILD:
        torch.save(stand_in(model_name), folder / f"{model_name}.th")
        print(folder / f"{model_name}.th")
