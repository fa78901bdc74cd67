"""keras_hub: backbones with BatchNorm, made small."""

from collections.abc import Callable
from typing import Any

import numpy as np

from normswap import Inputs

from . import Network

SHAPE = (64, 64, 3)
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 32, 64],
    "stackwise_num_blocks": [1, 1, 1],
    "stackwise_num_strides": [1, 2, 2],
}
EFFICIENT = {
    "stackwise_kernel_sizes": [3, 3, 3],
    "stackwise_num_repeats": [1, 2, 2],
    "stackwise_input_filters": [24, 24, 48],
    "stackwise_output_filters": [24, 48, 64],
    "stackwise_expansion_ratios": [1, 4, 4],
    "stackwise_squeeze_and_excite_ratios": [0.0, 0.0, 0.25],
    "stackwise_strides": [1, 2, 2],
    "stackwise_block_types": ["fused", "fused", "unfused"],
    "stackwise_width_coefficients": [1.0] * 3,
    "stackwise_depth_coefficients": [1.0] * 3,
    "stackwise_force_input_filters": [0] * 3,
    "stackwise_nores_option": [False] * 3,
}
MOBILE = {
    "stackwise_expansion": [[40, 56], [64, 144]],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_filters": [[16, 16], [24, 24]],
    "stackwise_kernel_size": [[3, 3], [5, 5]],
    "stackwise_num_strides": [[2, 1], [2, 1]],
    "stackwise_se_ratio": [[None, None], [0.25, 0.25]],
    "stackwise_activation": [["relu", "relu"], ["hard_swish", "hard_swish"]],
    "stackwise_padding": [[1, 1], [2, 2]],
    "output_num_filters": 64,
    "depthwise_filters": 8,
    "depthwise_stride": 2,
    "depthwise_residual": False,
    "last_layer_filter": 128,
    "input_activation": "hard_swish",
    "output_activation": "hard_swish",
    "input_num_filters": 16,
}
CSP = {
    "stem_filters": 32,
    "stem_kernel_size": 3,
    "stem_strides": 1,
    "stackwise_depth": [1, 2],
    "stackwise_strides": [1, 2],
    "stackwise_num_filters": [32, 64],
    "stage_type": "dark",
}
HGNET = {
    "depths": [1, 2],
    "embedding_size": 32,
    "hidden_sizes": [64, 128],
    "stem_channels": [3, 16, 32],
    "hidden_act": "relu",
    "stackwise_stage_filters": [(32, 16, 64, 1, 1, 3), (64, 32, 128, 2, 1, 3)],
    "apply_downsample": [False, True],
    "use_lightweight_conv_block": [False, False],
    "image_shape": (64, 64, 3),
}
MIT = {
    "layerwise_depths": [1, 1, 1, 1],
    "image_shape": (64, 64, 3),
    "hidden_dims": [16, 32, 40, 64],
    "num_layers": 4,
    "layerwise_num_heads": [1, 2, 5, 8],
    "layerwise_sr_ratios": [8, 4, 2, 1],
    "max_drop_path_rate": 0.1,
    "layerwise_patch_sizes": [7, 3, 3, 3],
    "layerwise_strides": [4, 2, 2, 2],
}


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return {
        "ResNetBackbone": _of("ResNetBackbone", **RESNET, block_type="basic_block"),
        "ResNetBackbone v2": _of("ResNetBackbone", **RESNET, block_type="bottleneck_block", use_pre_activation=True),
        "ResNetImageClassifier": _classifier,
        "DenseNetBackbone": _of("DenseNetBackbone", stackwise_num_repeats=[2, 2, 2]),
        "EfficientNetBackbone": _of("EfficientNetBackbone", **EFFICIENT),
        "MobileNetBackbone": _of("MobileNetBackbone", **MOBILE),
        "CSPNetBackbone": _of("CSPNetBackbone", **CSP, block_type="dark_block"),
        "XceptionBackbone": _of(
            "XceptionBackbone", stackwise_conv_filters=[[16, 32], [32, 64]], stackwise_pooling=[True, False]
        ),
        "HGNetV2Backbone": _of("HGNetV2Backbone", **HGNET, use_learnable_affine_block=False),
        "HGNetV2Backbone affine": _of("HGNetV2Backbone", **HGNET, use_learnable_affine_block=True),
        "DeepLabV3Backbone": _deeplab,
        "SegFormerImageSegmenter": _segformer,
        "RetinaNetBackbone": _retina,
        "BASNet": _basnet,
    }


def _of(name: str, **options: Any) -> Callable[[], Network]:
    return lambda: _network(_made(name, **options))


def _made(name: str, **options: Any) -> Any:
    import keras_hub

    return getattr(keras_hub.models, name, None)(**options)


def _network(model: Any) -> Network:
    return Network(model, Inputs(np.random.default_rng(0).random((2, 64, 64, 3), "float32")))


def _resnet(**options: Any) -> Any:
    stages = {
        "stackwise_num_filters": [64, 32, 64, 64],
        "stackwise_num_blocks": [1] * 4,
        "stackwise_num_strides": [1, 2, 2, 2],
    }
    return _made("ResNetBackbone", **RESNET | stages, block_type="basic_block", **options)


def _classifier() -> Network:
    return _network(_made("ResNetImageClassifier", backbone=_resnet(image_shape=SHAPE), num_classes=4))


def _deeplab() -> Network:
    return _network(
        _made(
            "DeepLabV3Backbone",
            image_encoder=_resnet(image_shape=SHAPE),
            projection_filters=16,
            low_level_feature_key="P2",
            spatial_pyramid_pooling_key="P5",
            upsampling_size=8,
            dilation_rates=[2, 4, 6],
            image_shape=(64, 64, 3),
        )
    )


def _segformer() -> Network:
    backbone = _made("SegFormerBackbone", image_encoder=_made("MiTBackbone", **MIT), projection_filters=32)
    return _network(_made("SegFormerImageSegmenter", backbone=backbone, num_classes=4))


def _retina() -> Network:
    return _network(
        _made(
            "RetinaNetBackbone",
            image_encoder=_resnet(image_shape=SHAPE),
            min_level=3,
            max_level=5,
            use_p5=True,
            image_shape=SHAPE,
        )
    )


def _basnet() -> Network:
    backbone = _made("BASNetBackbone", image_encoder=_resnet(), num_classes=1, image_shape=(64, 64, 3))
    return _network(_made("BASNetImageSegmenter", backbone=backbone))
