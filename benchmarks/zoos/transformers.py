"""transformers: images, detection, speech and series, from configurations, made small where those are large."""

from collections.abc import Callable
from typing import Any

import torch

from normswap import Inputs

from . import Network

PLAIN = {
    "resnet": ("ResNetForImageClassification", {}),
    "regnet": ("RegNetForImageClassification", {}),
    "mobilenet_v1": ("MobileNetV1ForImageClassification", {}),
    "mobilenet_v2": ("MobileNetV2ForImageClassification", {}),
    "mobilenet_v2 segmentation": ("MobileNetV2ForSemanticSegmentation", {}),
    "mobilevit": ("MobileViTForImageClassification", {}),
    "mobilevit segmentation": ("MobileViTForSemanticSegmentation", {}),
    "mobilevitv2": ("MobileViTV2ForImageClassification", {}),
    "efficientnet": ("EfficientNetForImageClassification", {}),
    "hgnet_v2": ("HGNetV2ForImageClassification", {}),
    "pp_lcnet": ("PPLCNetForImageClassification", {}),
    "swiftformer": ("SwiftFormerForImageClassification", {"image_size": 64}),
    "cvt": ("CvtForImageClassification", {}),
    "textnet": ("TextNetForImageClassification", {}),
    "segformer": ("SegformerForSemanticSegmentation", {}),
    "glpn": ("GLPNForDepthEstimation", {}),
    "superpoint": ("SuperPointForKeypointDetection", {}),
}
SIDED = {
    "levit": ("LevitForImageClassification", 224, {}),
    "beit": (
        "BeitForSemanticSegmentation",
        64,
        {"image_size": 64, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    ),
    "data2vec_vision": (
        "Data2VecVisionForSemanticSegmentation",
        64,
        {"image_size": 64, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]},
    ),
    "dpt": ("DPTForSemanticSegmentation", 64, {"image_size": 64, "use_batch_norm_in_fusion_residual": True}),
    "vitmatte": ("VitMatteForImageMatting", 64, {}),
    "vitpose": ("VitPoseForPoseEstimation", 0, {}),
    "upernet": ("UperNetForSemanticSegmentation", 64, {}),
    "zoedepth": ("ZoeDepthForDepthEstimation", 64, {}),
    "align vision": ("AlignVisionModel", 64, {}),
}
DETECTORS = {
    "detr": ("DetrForObjectDetection", {}),
    "conditional_detr": ("ConditionalDetrForObjectDetection", {}),
    "deformable_detr": ("DeformableDetrForObjectDetection", {}),
    "dab_detr": ("DabDetrForObjectDetection", {}),
    "table_transformer": ("TableTransformerForObjectDetection", {}),
    "rt_detr": ("RTDetrForObjectDetection", {}),
    "rt_detr_v2": ("RTDetrV2ForObjectDetection", {}),
    "d_fine": ("DFineForObjectDetection", {}),
    "lw_detr": ("LwDetrForObjectDetection", {}),
    "maskformer": ("MaskFormerForInstanceSegmentation", {}),
    "mask2former": ("Mask2FormerForUniversalSegmentation", {}),
}
SERIES = ("patchtst", "patchtsmixer", "informer")
SPEECH = ("wav2vec2_conformer", "hubert", "fastspeech2_conformer", "speecht5", "parakeet", "lasr", "clap", "groupvit")


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    found = {name: _image(kind, 64, options) for name, (kind, options) in PLAIN.items()}
    found |= {name: _image(kind, side, options) for name, (kind, side, options) in SIDED.items()}
    found |= {name: _image(kind, 128, options) for name, (kind, options) in DETECTORS.items()}
    return found | {name: globals()[f"_{name}"] for name in SERIES + SPEECH}


def _image(kind: str, side: int, options: dict[str, Any]) -> Callable[[], Network]:
    def build() -> Network:
        import transformers

        cls = getattr(transformers, kind)
        model = cls(_without_download(cls.config_class(**options)))
        height, width = (side, side) if side else getattr(model.config.backbone_config, "image_size", (256, 192))
        return Network(
            model, Inputs(pixel_values=torch.rand(2, 3 + (kind == "VitMatteForImageMatting"), height, width))
        )

    return build


def _without_download(config: Any) -> Any:
    for name in ("use_pretrained_backbone", "load_backbone"):
        if hasattr(config, name):
            setattr(config, name, False)
    return config


def _patchtst() -> Network:
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=3, context_length=32, patch_length=4, patch_stride=4, num_hidden_layers=2
    )
    return Network(PatchTSTForPrediction(config), Inputs(past_values=torch.randn(2, 32, 3)))


def _patchtsmixer() -> Network:
    from transformers import PatchTSMixerConfig, PatchTSMixerForPrediction

    config = PatchTSMixerConfig(num_input_channels=3, context_length=32, patch_length=8, norm_mlp="BatchNorm")
    return Network(PatchTSMixerForPrediction(config), Inputs(past_values=torch.randn(2, 32, 3)))


def _informer() -> Network:
    from transformers import InformerConfig, InformerModel

    config = InformerConfig(prediction_length=4, context_length=16, lags_sequence=[1, 2], num_time_features=1)
    past = config.context_length + 2
    return Network(
        InformerModel(config),
        Inputs(
            past_values=torch.randn(2, past),
            past_time_features=torch.randn(2, past, 1),
            past_observed_mask=torch.ones(2, past),
            future_values=torch.randn(2, 4),
            future_time_features=torch.randn(2, 4, 1),
        ),
    )


def _wav2vec2_conformer() -> Network:
    from transformers import Wav2Vec2ConformerConfig, Wav2Vec2ConformerForCTC

    config = Wav2Vec2ConformerConfig(
        vocab_size=32, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64
    )
    return Network(Wav2Vec2ConformerForCTC(config), Inputs(torch.randn(2, 8000)))


def _hubert() -> Network:
    from transformers import HubertConfig, HubertForCTC

    config = HubertConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=64, conv_pos_batch_norm=True
    )
    return Network(HubertForCTC(config), Inputs(torch.randn(2, 8000)))


def _fastspeech2_conformer() -> Network:
    from transformers import FastSpeech2ConformerConfig, FastSpeech2ConformerModel

    config = FastSpeech2ConformerConfig(encoder_layers=2, decoder_layers=2)
    return Network(FastSpeech2ConformerModel(config), Inputs(input_ids=torch.randint(1, 50, (2, 12))))


def _speecht5() -> Network:
    from transformers import SpeechT5Config, SpeechT5ForTextToSpeech

    config = SpeechT5Config(
        encoder_layers=2, decoder_layers=2, hidden_size=64, encoder_attention_heads=4, decoder_attention_heads=4
    )
    return Network(
        SpeechT5ForTextToSpeech(config),
        Inputs(
            input_ids=torch.randint(5, 70, (2, 12)),
            decoder_input_values=torch.randn(2, 16, 80),
            speaker_embeddings=torch.randn(2, 512),
        ),
    )


def _parakeet() -> Network:
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetForCTC

    small = ParakeetEncoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=40, pad_token_id=39, encoder_config=small.to_dict()))
    return Network(
        model, Inputs(input_features=torch.randn(2, 64, 80), attention_mask=torch.ones(2, 64, dtype=torch.bool))
    )


def _lasr() -> Network:
    from transformers import LasrCTCConfig, LasrEncoderConfig, LasrForCTC

    small = LasrEncoderConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = LasrForCTC(LasrCTCConfig(vocab_size=40, pad_token_id=39, encoder_config=small.to_dict()))
    return Network(
        model, Inputs(input_features=torch.randn(2, 64, 128), attention_mask=torch.ones(2, 64, dtype=torch.bool))
    )


def _clap() -> Network:
    from transformers import ClapAudioConfig, ClapAudioModel

    return Network(ClapAudioModel(ClapAudioConfig()), Inputs(input_features=torch.randn(2, 1, 1001, 64)))


def _groupvit() -> Network:
    from transformers import GroupViTConfig, GroupViTModel

    return Network(
        GroupViTModel(GroupViTConfig()),
        Inputs(
            input_ids=torch.randint(1, 400, (2, 8)),
            attention_mask=torch.ones(2, 8, dtype=torch.long),
            pixel_values=torch.rand(2, 3, 224, 224),
        ),
    )
