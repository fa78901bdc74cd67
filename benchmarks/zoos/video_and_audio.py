"""pytorchvideo, Asteroid, SpeechBrain, Open-Unmix and others: clips, speech and music."""

from collections.abc import Callable

import torch

from normswap import Inputs

from . import Network, of


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    clip, wave, frames = torch.randn(2, 3, 8, 96, 96), torch.randn(2, 4000), torch.randn(2, 40, 80)
    return {
        "slow_r50": of("pytorchvideo.models:create_resnet", clip, model_depth=50, head_pool_kernel_size=(4, 3, 3)),
        "slowfast_r50": _slowfast,
        "csn_r50": of("pytorchvideo.models:create_csn", clip, model_depth=50, head_pool_kernel_size=(1, 3, 3)),
        "x3d_xs": of("pytorchvideo.models.x3d:create_x3d", clip[:, :, :4], input_clip_length=4, input_crop_size=96),
        "r2plus1d_r50": of(
            "pytorchvideo.models.r2plus1d:create_r2plus1d", clip, model_depth=50, head_pool_kernel_size=(1, 3, 3)
        ),
        "DCUNet": of("asteroid.models:DCUNet", torch.randn(2, 1, 8000), architecture="mini", fix_length_mode="pad"),
        "ConvTasNet bN": of("asteroid.models:ConvTasNet", wave, n_src=2, n_blocks=2, n_repeats=1, norm_type="bN"),
        "ECAPA-TDNN": of("speechbrain.lobes.models.ECAPA_TDNN:ECAPA_TDNN", frames, 80, channels=[64] * 4 + [192]),
        "x-vector": of("speechbrain.lobes.models.Xvector:Xvector", frames, in_channels=80),
        "ResNet-SE speaker": of(
            "speechbrain.lobes.models.ResNet:ResNet", frames, input_size=80, channels=[8, 8, 16, 16]
        ),
        "ContextNet": of("speechbrain.lobes.models.ContextNet:ContextNet", frames, (2, 40, 80), out_channels=16),
        "CRDNN": of(
            "speechbrain.lobes.models.CRDNN:CRDNN", frames, input_shape=(2, 40, 80), rnn_layers=1, rnn_neurons=16
        ),
        "Cnn14": of("speechbrain.lobes.models.Cnn14:Cnn14", torch.randn(2, 128, 80), mel_bins=80, emb_dim=128),
        "SEGAN discriminator": of(
            "speechbrain.lobes.models.segan_model:Discriminator", torch.randn(2, 16384, 2), kernel_size=31
        ),
        "Tacotron2": _tacotron2,
        "Open-Unmix": of(
            "openunmix.model:OpenUnmix", torch.rand(2, 2, 129, 16), nb_bins=129, nb_channels=2, hidden_size=32
        ),
        "conformer": _conformer,
        "wav2letter": of("torchaudio.models:Wav2Letter", torch.randn(2, 1, 4000), input_type="waveform"),
        "torchaudio conformer": _torchaudio_conformer,
        "WaveRNN": of(
            "torchaudio.models:WaveRNN",
            (torch.randn(2, 1, 3200), torch.randn(2, 1, 8, 20)),
            upsample_scales=[5, 5, 8],
            n_classes=16,
            hop_length=200,
            n_rnn=16,
            n_fc=16,
            n_freq=8,
            n_hidden=16,
            n_output=16,
        ),
    }


def _slowfast() -> Network:
    from pytorchvideo.models import create_slowfast

    model = create_slowfast(model_depth=50, head_pool_kernel_sizes=((2, 3, 3), (8, 3, 3)))
    return Network(model, Inputs([torch.randn(2, 3, 2, 96, 96), torch.randn(2, 3, 8, 96, 96)]))


def _tacotron2() -> Network:
    from torchaudio.models import Tacotron2

    model = Tacotron2(n_symbol=20, symbol_embedding_dim=32, encoder_embedding_dim=32, n_mels=8)
    return Network(
        model,
        Inputs(torch.randint(0, 20, (2, 7)), torch.tensor([7, 7]), torch.randn(2, 8, 10), torch.tensor([10, 10])),
    )


def _conformer() -> Network:
    from conformer import Conformer

    return Network(Conformer(dim=32, depth=2, heads=2, dim_head=16), Inputs(torch.randn(2, 20, 32)))


def _torchaudio_conformer() -> Network:
    from torchaudio.models import Conformer

    model = Conformer(input_dim=16, num_heads=2, ffn_dim=32, num_layers=2, depthwise_conv_kernel_size=5)
    return Network(model, Inputs(torch.randn(2, 20, 16), torch.tensor([20, 20])))
