# Copyright 2026 The LeMoRe-HF contributors.
# SPDX-License-Identifier: Apache-2.0
"""LeMoRe model configuration."""

import math
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

VIEWS = ("transverse", "frontal", "lateral")
STAGE_STRIDES = (4, 8, 16, 32)
LARGEST_NATIVE_SIDE = 16384  # weights of an axis grow with the square of its length


@strict
class LeMoReConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of a LeMoRe network ("Learn More Details for Lightweight Semantic Segmentation", ICIP 2025,
    arXiv 2505.23093). The defaults give the 1.6 M-parameter network of the paper. The paper publishes totals, not
    widths: the widths below are this project's reading, which reproduces the eight rows of the paper's ablation table.

    Args:
        num_channels (`int`, *optional*, defaults to 3):
            Input channels.
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 512):
            The native grid as `(height, width)`, from 32 to 16384 each: the size that the frontal and lateral weights
            are made for. Other input sizes work too, larger ones as well; the weights are then resampled.
        stem_sizes (`list[int]`, *optional*, defaults to `(16, 16)`):
            Channels of the stem's 3×3 convolutions. The first has stride 2.
        hidden_sizes (`list[int]`, *optional*, defaults to `(16, 48, 128, 176)`):
            Channels C₁..C₄ of the four stages, at strides 4, 8, 16 and 32.
        views (`list[str]`, *optional*, defaults to `("transverse", "frontal", "lateral")`):
            The Cartesian views that are summed in each encoder; any non-empty subset.
        dilation (`int`, *optional*, defaults to 2):
            Dilation of the second pair of depthwise convolutions in each Cartesian encoder.
        use_residual (`bool`, *optional*, defaults to `True`):
            Whether a residual connection runs around each Cartesian encoder.
        use_channel_attention (`bool`, *optional*, defaults to `True`):
            Whether each Cartesian encoder ends with channel attention (squeeze-and-excitation).
        channel_attention_reduction (`int`, *optional*, defaults to 2):
            The hidden width of channel attention is `Cᵢ // channel_attention_reduction`.
        use_nested_attention (`bool`, *optional*, defaults to `True`):
            Whether nested attention and its feed-forward network refine the token pyramid. Without them the pooled
            tokens are the global features.
        num_nested_projections (`int`, *optional*, defaults to 3):
            How many queries, keys and values nested attention projects; it combines the square of it many maps.
        nested_attention_softmax (`str`, *optional*, defaults to `"per_map"`):
            `"per_map"`: each query-key map has its own softmax, then their mean is taken. `"sum"`: one softmax of the
            summed products.
        num_attention_heads (`int`, *optional*, defaults to 3):
            Heads of nested attention.
        attention_key_dim (`int`, *optional*, defaults to 16):
            Channels a head has in each query and key.
        attention_value_dim (`int`, *optional*, defaults to 32):
            Channels a head has in each value.
        mlp_ratio (`float`, *optional*, defaults to 0.5):
            Hidden width of the feed-forward network over its width.
        token_stride (`int`, *optional*, defaults to 64):
            Stride of the token pyramid; a multiple of 32.
        decoder_hidden_size (`int`, *optional*, defaults to 224):
            Channels of the gated fusion modules and of the segmentation head.
        output_stride (`int`, *optional*, defaults to 8):
            Stride of the segmentation head and its logits: 4, 8, 16 or 32.
        hidden_act (`str`, *optional*, defaults to `"relu6"`):
            Activation, a name that Transformers knows.
        drop_path_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the last residual branch; it grows linearly from 0 with depth. The branches are the
            Cartesian encoders (with `use_residual`) and the global block (with `use_nested_attention`).
        drop_view_rate (`float`, *optional*, defaults to 0.0):
            Stochastic depth of the frontal and of the lateral view: the share of training images that an encoder sees
            without the one, or the other (our choice). Their weights know places of the image, which a small data set
            lets them learn by heart.
        classifier_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout before the classifier: whole channels in segmentation, single values in classification.
        batch_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the batch norms.
        batch_norm_momentum (`float`, *optional*, defaults to 0.1):
            Momentum of the batch norms' running statistics.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the initial weights of all convolutions and classifiers (our choice; batch norms follow
            the convolutions).
        axis_initialization (`str`, *optional*, defaults to `"zeros"`):
            Initial frontal and lateral weights (our choice): `"zeros"`, so that training starts from the transverse
            view alone, which must then be among `views`; `"normal"` (variance 1 / size), or `"identity"`.
        is_fused (`bool`, *optional*, defaults to `False`):
            Whether the model is the inference copy that [`~LeMoRePreTrainedModel.fuse`] makes. It tells how to read
            its weights: convert a model with `fuse()`, not by setting this.
        semantic_loss_ignore_index (`int`, *optional*, defaults to 255):
            The label of void pixels, left out of the segmentation loss; none of the classes' own.
        palette (`list[list[int]]`, *optional*):
            An RGB colour (0 to 255) for each label, used to draw masks.
        out_features (`list[str]`, *optional*):
            Feature maps that [`LeMoReBackbone`] returns, of `"stem"`, `"stage1"` .. `"stage4"`. Defaults to the last.
        out_indices (`list[int]`, *optional*):
            The same as indices.

    Raises:
        `ValueError`: naming the field, when values are out of range or contradict each other.
        `huggingface_hub.errors.StrictDataclassError`: naming the field, for a value of the wrong type; also when an
        existing configuration that was changed to contradictory values is saved.

    Example:

    ```python
    >>> from lemore_hf import LeMoReConfig, LeMoReForSemanticSegmentation

    >>> config = LeMoReConfig(num_labels=150)
    >>> model = LeMoReForSemanticSegmentation(config)
    >>> model.num_parameters()
    1591374
    ```
    """

    model_type = "lemore"

    num_channels: int = 3
    image_size: int | list[int] | tuple[int, ...] = 512
    stem_sizes: list[int] | tuple[int, ...] = (16, 16)
    hidden_sizes: list[int] | tuple[int, ...] = (16, 48, 128, 176)
    views: list[str] | tuple[str, ...] = VIEWS
    dilation: int = 2
    use_residual: bool = True
    use_channel_attention: bool = True
    channel_attention_reduction: int = 2
    use_nested_attention: bool = True
    num_nested_projections: int = 3
    nested_attention_softmax: str = "per_map"
    num_attention_heads: int = 3
    attention_key_dim: int = 16
    attention_value_dim: int = 32
    mlp_ratio: float | int = 0.5
    token_stride: int = 64
    decoder_hidden_size: int = 224
    output_stride: int = 8
    hidden_act: str = "relu6"
    drop_path_rate: float | int = 0.0
    drop_view_rate: float | int = 0.0
    classifier_dropout_prob: float | int = 0.1
    batch_norm_eps: float | int = 1e-5
    batch_norm_momentum: float | int = 0.1
    initializer_range: float | int = 0.02
    axis_initialization: str = "zeros"
    is_fused: bool = False
    semantic_loss_ignore_index: int = 255
    palette: list[list[int] | tuple[int, ...]] | None = None

    if TYPE_CHECKING:
        # Transformers takes these beside the fields, where type checkers do not look for them.
        num_labels: int = 2
        out_features: list[str] | None = None
        out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.stem_sizes = list(self.stem_sizes)
        self.hidden_sizes = list(self.hidden_sizes)
        self.views = list(self.views)
        if not isinstance(self.image_size, int):
            self.image_size = list(self.image_size)
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, len(self.hidden_sizes) + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)
        # `strict` validates too, but what it raises is no `ValueError`.
        self.validate_architecture()

    @property
    def native_size(self) -> tuple[int, int]:
        """`image_size` as `(height, width)`."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else tuple(self.image_size)

    @property
    def native_grids(self) -> list[tuple[int, int]]:
        """`(height, width)` of each stage's feature map at the native size; halves are rounded up."""
        return [tuple(math.ceil(side / stride) for side in self.native_size) for stride in STAGE_STRIDES]

    @property
    def num_hidden_layers(self) -> int:
        """The number of stages."""
        return len(self.hidden_sizes)

    @property
    def hidden_size(self) -> int:
        """Channels S of the token pyramid and of the global features: the stages' channels together."""
        return sum(self.hidden_sizes)

    def validate_architecture(self) -> None:
        """Refuse values that are out of range or contradict each other."""
        self._check_stages()
        self._check_views()
        self._check_sizes()
        self._check_strides()
        self._check_choices()
        self._check_rates()
        self._check_labels()

    def _check_stages(self):
        if len(self.hidden_sizes) != len(STAGE_STRIDES):
            raise ValueError(f"`hidden_sizes` must name the channels of four stages, got {self.hidden_sizes}.")
        if not self.stem_sizes:
            raise ValueError("`stem_sizes` is empty: the stem needs at least one convolution, e.g. (16, 16).")
        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"`image_size` must be one side or (height, width), got {self.image_size}.")
        if min(self.native_size) < STAGE_STRIDES[-1]:
            raise ValueError(
                f"`image_size` must be at least {STAGE_STRIDES[-1]} on each side, since the last stage has that "
                f"stride; got {self.image_size}."
            )
        if max(self.native_size) > LARGEST_NATIVE_SIDE:
            raise ValueError(
                f"`image_size` must be at most {LARGEST_NATIVE_SIDE} on each side, whose axes have weights that fit into "
                f"memory; got {self.image_size}. Larger images may be given to a network of a smaller native size."
            )

    def _check_views(self):
        if not self.views:
            raise ValueError(f"`views` is empty: name at least one of {list(VIEWS)}.")
        if not set(self.views) <= set(VIEWS) or len(set(self.views)) != len(self.views):
            raise ValueError(f"`views` must be distinct names out of {list(VIEWS)}, got {self.views}.")
        if self.axis_initialization == "zeros" and "transverse" not in self.views:
            raise ValueError(
                "`axis_initialization`='zeros' needs 'transverse' among `views`: without it every encoder starts, and "
                f"stays, at zero; got views {self.views}. Choose 'normal' or 'identity'."
            )

    def _check_sizes(self):
        names = (
            "num_channels",
            "dilation",
            "channel_attention_reduction",
            "num_nested_projections",
            "num_attention_heads",
            "attention_key_dim",
            "attention_value_dim",
            "decoder_hidden_size",
        )
        sizes = {name: getattr(self, name) for name in names}
        for name in ("stem_sizes", "hidden_sizes"):
            sizes |= {f"{name}[{index}]": size for index, size in enumerate(getattr(self, name))}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"`{name}` must be at least 1, got {size}.")
        if self.use_channel_attention and self.channel_attention_reduction > min(self.hidden_sizes):
            raise ValueError(
                f"`channel_attention_reduction`={self.channel_attention_reduction} leaves no hidden channel of the "
                f"narrowest stage ({min(self.hidden_sizes)} channels); lower it or set `use_channel_attention=False`."
            )
        if not 1 <= self.mlp_ratio * self.hidden_size < math.inf:
            raise ValueError(f"`mlp_ratio` must be finite and leave a hidden channel at least, got {self.mlp_ratio}.")

    def _check_strides(self):
        if self.output_stride not in STAGE_STRIDES:
            raise ValueError(f"`output_stride` must be one of {list(STAGE_STRIDES)}, got {self.output_stride}.")
        if self.token_stride < STAGE_STRIDES[-1] or self.token_stride % STAGE_STRIDES[-1]:
            raise ValueError(f"`token_stride` must be a multiple of {STAGE_STRIDES[-1]}, got {self.token_stride}.")

    def _check_choices(self):
        choices = {
            "nested_attention_softmax": ("per_map", "sum"),
            "axis_initialization": ("normal", "identity", "zeros"),
            "hidden_act": tuple(ACT2FN),
        }
        for name, values in choices.items():
            if getattr(self, name) not in values:
                raise ValueError(f"`{name}` must be one of {', '.join(values)}; got {getattr(self, name)!r}.")

    def _check_rates(self):
        for name in ("drop_path_rate", "drop_view_rate", "classifier_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")
        if self.drop_path_rate > 0 and not (self.use_residual or self.use_nested_attention):
            raise ValueError(
                f"`drop_path_rate`={self.drop_path_rate} has no residual branch to drop: set it to 0, or set "
                "`use_residual` or `use_nested_attention`."
            )
        if self.drop_view_rate > 0 and set(self.views) == {"transverse"}:
            raise ValueError(
                f"`drop_view_rate`={self.drop_view_rate} has no view to drop: set it to 0, or add `frontal` or "
                "`lateral` to `views`."
            )
        if not 0 < self.batch_norm_momentum <= 1:
            raise ValueError(f"`batch_norm_momentum` must be in (0, 1], got {self.batch_norm_momentum}.")
        if not 0 < self.batch_norm_eps < math.inf:
            raise ValueError(f"`batch_norm_eps` must be positive and finite, got {self.batch_norm_eps}.")
        if not 0 <= self.initializer_range < math.inf:
            raise ValueError(f"`initializer_range` must be finite and not negative, got {self.initializer_range}.")

    def _check_labels(self):
        if self.num_labels < 1:
            raise ValueError(f"`num_labels` must be at least 1 (a binary task), got {self.num_labels}.")
        if (keys := {int(key) for key in self.id2label}) != set(range(self.num_labels)):
            raise ValueError(
                f"`id2label` must number its {self.num_labels} labels from 0 to {self.num_labels - 1}, got {sorted(keys)[:8]}: "
                "count from 0, and where a data set counts its classes from 1, set `do_reduce_labels=True` in the image "
                "processor."
            )
        if self.palette is not None and any(
            len(colour) != 3 or not all(0 <= value <= 255 for value in colour) for colour in self.palette
        ):
            raise ValueError(f"`palette` must hold RGB triples of 0 to 255, got {self.palette}.")


__all__ = ["LeMoReConfig"]
