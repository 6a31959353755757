"""The architecture as one frozen dataclass with Hugging Face's field names.

`ModernBertConfig.from_dict` reads the `config.json` of transformers 4.48 and of transformers 5;
`to_dict` writes one that both versions read.
"""

import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from modernbert_jax.untrusted import MAX_MODEL_JSON, printable, read_json, shown

FULL, SLIDING = "full_attention", "sliding_attention"

# The names of layers.ACTIVATIONS, which are those of ACT2FN in transformers.
ACTIVATION_NAMES = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "gelu_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModernBertConfig:
    """Every option that changes a result of the model. Defaults are ModernBERT-base's.

    Raises ValueError for values that are invalid or inconsistent.
    Source: arXiv 2412.13663 and the `config.json` of the released checkpoints.
    """

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152  # F, one half of the GLU
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    max_position_embeddings: int = 8192  # tokens; training refuses longer sequences

    layer_types: tuple[str, ...] = ()  # () means (full, sliding, sliding) repeated
    local_attention: int = 128  # the window, twice the radius; with 1 a token sees only itself
    global_rope_theta: float = 160_000.0
    local_rope_theta: float | None = 10_000.0  # None or <= 0: equal to the global theta

    hidden_activation: str = "gelu"  # the exact one (erf)
    classifier_activation: str = "gelu"  # also of the MLM head
    norm_eps: float = 1e-5
    norm_bias: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    decoder_bias: bool = True
    classifier_bias: bool = False  # of head.dense
    tie_word_embeddings: bool = True

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0  # of the probabilities and the output of attn.Wo
    attention_out_dropout: float = 0.0  # of the output of attn.Wo only; not in transformers
    mlp_dropout: float = 0.0
    classifier_dropout: float = 0.0

    initializer_range: float = 0.02
    initializer_cutoff_factor: float | None = 2.0  # in standard deviations; None means 3

    classifier_pooling: str = "cls"  # or "mean"
    num_labels: int = 2
    id2label: tuple[str, ...] = ()  # names in order, or {id: name}; () means LABEL_0, LABEL_1, ...
    problem_type: str | None = None

    output_hidden_states: bool = False  # what a call returns that says nothing else
    output_attentions: bool = False

    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | None = 50282
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282

    # dtype is the dtype of computation; param_dtype is called dtype in config.json (torch_dtype
    # before transformers 5).
    dtype: str = "float32"
    param_dtype: str = "float32"
    residual_dtype: str = "float32"

    # The keys of a config.json without meaning here, as JSON text, so that a round trip keeps them.
    hf_extra: str = "{}"

    def __post_init__(self) -> None:
        set_ = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for field in dataclasses.fields(self):
            if field.name not in _LIMITS:
                _check_type(field.name, field.type, getattr(self, field.name))
        for name in _LIMITS:
            check_size(name, getattr(self, name))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"head size {self.head_dim} (hidden_size / num_attention_heads) must be even: "
                "RoPE rotates pairs"
            )
        if not self.layer_types:
            set_("layer_types", _every_n(self.num_hidden_layers, 3))
        set_("layer_types", tuple(self.layer_types))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types: expected {self.num_hidden_layers} entries (num_hidden_layers), "
                f"got {len(self.layer_types)}"
            )
        for kind in self.layer_types:
            if kind not in (FULL, SLIDING):
                raise ValueError(
                    f"layer_types: expected {FULL!r} or {SLIDING!r}, got {shown(kind)}"
                )
        if self.local_rope_theta is None or self.local_rope_theta <= 0:
            set_("local_rope_theta", self.global_rope_theta)
        for name in (
            "global_rope_theta", "norm_eps", "initializer_range", "initializer_cutoff_factor",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) not in ACTIVATION_NAMES:
                raise ValueError(
                    f"{name}: expected one of {', '.join(ACTIVATION_NAMES)}, "
                    f"got {shown(getattr(self, name))}"
                )
        for name in DROPOUTS:
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}: expected 0 <= rate < 1, got {getattr(self, name)!r}")
        if self.classifier_pooling not in ("cls", "mean"):
            raise ValueError(
                f"classifier_pooling: expected 'cls' or 'mean', got "
                f"{shown(self.classifier_pooling)}"
            )
        for name in ("dtype", "param_dtype", "residual_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(
                    f"{name}: expected one of {', '.join(DTYPES)}, got {shown(getattr(self, name))}"
                )
        names = label_names(self.id2label) or tuple(f"LABEL_{i}" for i in range(self.num_labels))
        set_("id2label", names)
        if len(self.id2label) != self.num_labels:
            raise ValueError(
                f"id2label: expected {self.num_labels} names (num_labels), got {len(self.id2label)}"
            )
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"pad_token_id: expected an id below vocab_size {self.vocab_size}, "
                f"got {self.pad_token_id}"
            )

    # Derived values.

    @property
    def model_type(self) -> str:
        """ "modernbert", as in config.json."""
        return "modernbert"

    @property
    def label2id(self) -> dict[str, int]:
        """The number of each label: the reverse of id2label."""
        return {name: i for i, name in enumerate(self.id2label)}

    @property
    def head_dim(self) -> int:
        """K, the size of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def window(self) -> int:
        """The radius of a sliding layer in tokens: query i sees keys with |i - j| <= window."""
        return self.local_attention // 2

    @property
    def has_dropout(self) -> bool:
        """Whether any rate of dropout is above 0."""
        return any(getattr(self, name) for name in DROPOUTS)

    def rope_theta(self, kind: str) -> float:
        """The base of RoPE in layers of `kind`."""
        theta = self.global_rope_theta if kind == FULL else self.local_rope_theta
        assert theta is not None  # set in __post_init__
        return theta

    def replace(self, **changes: Any) -> "ModernBertConfig":
        """Returns a copy with changed fields; a new depth resets layer_types to the default.

        id2label ({id: name}, or names in order) also sets num_labels, and a new num_labels drops
        the names. label2id ({name: id}) may repeat id2label. Raises ValueError if they disagree.
        """
        depth = changes.get("num_hidden_layers", self.num_hidden_layers)
        if depth != self.num_hidden_layers and "layer_types" not in changes:
            changes["layer_types"] = ()
        label2id = changes.pop("label2id", None)
        for name in changes.keys() - {f.name for f in dataclasses.fields(self)}:
            raise TypeError(f"{name}: expected a field of ModernBertConfig")
        if names := label_names(changes.get("id2label") or ()):
            changes.setdefault("num_labels", len(names))
        elif changes.get("num_labels", self.num_labels) != self.num_labels:
            changes.setdefault("id2label", ())
        if label2id is not None and label2id != {name: i for i, name in enumerate(names)}:
            raise ValueError(
                "label2id: expected the reverse of id2label, which must be given with it, got "
                f"{dict(label2id)!r} for {dict(enumerate(names))!r}"
            )
        return dataclasses.replace(self, **changes)

    # Presets.

    @classmethod
    def base(cls, **changes: Any) -> "ModernBertConfig":
        """ModernBERT-base: 149,655,232 parameters with its MLM head."""
        return cls(classifier_pooling="mean").replace(**changes)

    @classmethod
    def large(cls, **changes: Any) -> "ModernBertConfig":
        """ModernBERT-large: 395,881,664 parameters with its MLM head."""
        return cls(
            hidden_size=1024,
            intermediate_size=2624,
            num_hidden_layers=28,
            num_attention_heads=16,
            classifier_pooling="mean",
        ).replace(**changes)

    @classmethod
    def tiny(cls, **changes: Any) -> "ModernBertConfig":
        """Four layers of width 128, for demonstrations and tests."""
        return cls(
            vocab_size=4096,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=1024,
            local_attention=128,
            initializer_range=0.09,  # 128 ** -0.5: with 0.02 so narrow a model learns slowly
            classifier_pooling="mean",
            pad_token_id=2,
            bos_token_id=0,
            cls_token_id=0,
            eos_token_id=1,
            sep_token_id=1,
        ).replace(**changes)

    # config.json.

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "ModernBertConfig":
        """Reads a `config.json` of transformers 4.48 or 5.

        The RoPE bases come from rope_parameters, then global_rope_theta and local_rope_theta, then
        the defaults; sliding_window, a radius, wins over local_attention, as in transformers, and
        float64 becomes float32.
        Raises ValueError for another model_type, a quantized model, a rope_type other than
        "default", invalid values, or return_dict and is_causal where they would change the result
        of a call in transformers.
        """
        data = dict(data)
        for name in _OBJECTS:
            if not isinstance(data.get(name), Mapping | None):
                raise ValueError(f"{name}: expected an object or null, got {shown(data[name])}")
        model_type = data.pop("model_type", "modernbert")
        if model_type != "modernbert":
            raise ValueError(
                f"model_type: expected 'modernbert', got {shown(model_type)}; only ModernBERT can "
                "be loaded (`python -m train finetune --backend torch` fine-tunes other models)"
            )
        for name, value, reason in (
            ("return_dict", True, "outputs are always named"),
            ("is_causal", False, "an encoder attends in both directions"),
        ):
            if data.get(name) not in (None, value):
                raise ValueError(
                    f"{name}: expected {str(value).lower()} ({reason}), got {shown(data[name])}"
                )
        for name in ("quantization_config", "compression_config"):
            if (found := data.pop(name, None)) is not None:
                method = found.get("quant_method") if isinstance(found, Mapping) else found
                raise ValueError(
                    f"{name}: expected none, got the method {shown(method)}: quantized weights "
                    "cannot be loaded; use the original model, or save this one dequantized to "
                    "float32, bfloat16 or float16"
                )
        fields: dict[str, Any] = {}

        if "sliding_window" in data:
            radius = data.pop("sliding_window")
            if type(radius) is not int or radius < 0:
                raise ValueError(
                    f"sliding_window: expected an integer of at least 0, got {shown(radius)}"
                )
            data["local_attention"] = 2 * radius

        n = data.pop("global_attn_every_n_layers", None)
        depth = data.get("num_hidden_layers", cls.num_hidden_layers)
        layer_types = data.pop("layer_types", None)
        if not isinstance(layer_types, list | tuple | None):
            raise ValueError(f"layer_types: expected a list, got {shown(layer_types)}")
        check_size("num_hidden_layers", depth)
        fields["layer_types"] = tuple(layer_types or _every_n(depth, 3 if n is None else n))

        rope = data.pop("rope_parameters", None) or {}
        scaling = data.pop("rope_scaling", None) or {}
        if "rope_theta" in rope or "rope_type" in rope:  # one dictionary for both kinds
            rope = {FULL: rope, SLIDING: rope}
        thetas = {}
        for kind, legacy, default in (
            (FULL, "global_rope_theta", 160_000.0),
            (SLIDING, "local_rope_theta", 10_000.0),
        ):
            own = rope.get(kind) or {}
            if not isinstance(own, Mapping):
                raise ValueError(f"rope_parameters[{kind!r}]: expected an object, got {shown(own)}")
            parameters = {**own, **scaling}  # this order is transformers'
            rope_type = parameters.get("rope_type", parameters.get("type", "default"))
            if rope_type != "default":
                raise ValueError(
                    f"rope_parameters[{kind!r}]: expected rope_type 'default', the only one that "
                    f"is supported, got {shown(rope_type)}"
                )
            legacy_theta = data.pop(legacy, default)
            thetas[kind] = parameters.get("rope_theta", legacy_theta)
        fields["global_rope_theta"], fields["local_rope_theta"] = thetas[FULL], thetas[SLIDING]

        stored = data.pop("torch_dtype", None)
        stored = data.pop("dtype", None) or stored
        if stored is not None:
            stored = str(stored).removeprefix("torch.").replace("float64", "float32")
            fields["param_dtype"] = fields["dtype"] = stored

        names = label_names(data.pop("id2label", None) or ())
        label2id = dict(data.pop("label2id", None) or {})
        if names:
            fields["id2label"] = names
            data.setdefault("num_labels", len(names))
            # transformers leaves its default names (LABEL_0) in label2id if only id2label is set.
            for name in label2id.keys() & set(names):
                number = str(label2id[name])
                if not number.isdecimal() or dict(enumerate(names)).get(int(number)) != name:
                    raise ValueError(
                        f"label2id: expected {names.index(name)} for {shown(name)}, as in "
                        f"id2label, got {shown(label2id[name])}"
                    )
        if isinstance(eos := data.get("eos_token_id"), list):
            if not eos:
                raise ValueError("eos_token_id: expected an integer or null, got an empty list")
            data["eos_token_id"] = eos[0]
        head_dim = data.pop("head_dim", None)

        data.pop("architectures", None)  # the checkpoint's: checkpoint.files.read_config
        known = {f.name for f in dataclasses.fields(cls)} - {"hf_extra"}
        for name in list(data):
            if name in known:
                fields.setdefault(name, data.pop(name))
        fields["hf_extra"] = json.dumps(data, sort_keys=True)
        config = cls(**fields)
        if head_dim is not None and head_dim != config.head_dim:
            raise ValueError(f"head_dim: expected {config.head_dim}, got {shown(head_dim)}")
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns a `config.json` that transformers 4.48 and 5 both read."""
        data = json.loads(self.hf_extra)
        data["model_type"] = self.model_type
        skip = ("hf_extra", "dtype", "param_dtype", "residual_dtype", "layer_types", "id2label")
        for field in dataclasses.fields(self):
            if field.name not in skip:
                data[field.name] = getattr(self, field.name)
        data["layer_types"] = list(self.layer_types)
        for n in range(1, self.num_hidden_layers + 1):  # 4.48 knows only "every n"
            if self.layer_types == _every_n(self.num_hidden_layers, n):
                data["global_attn_every_n_layers"] = n
                break
        data["rope_parameters"] = {
            kind: {"rope_type": "default", "rope_theta": self.rope_theta(kind)}
            for kind in (FULL, SLIDING)
        }
        data.pop("num_labels")
        data["id2label"] = {str(i): name for i, name in enumerate(self.id2label)}
        data["label2id"] = self.label2id
        data["dtype"] = data["torch_dtype"] = self.param_dtype
        for name in ("attention_out_dropout", "output_hidden_states", "output_attentions"):
            if not data[name]:
                data.pop(name)
        return dict(sorted(data.items()))

    @classmethod
    def from_json(cls, path: Any) -> "ModernBertConfig":
        """Reads a `config.json`. Raises ValueError, with the path, if it is not valid."""
        data = read_json(pathlib.Path(path) if isinstance(path, str) else path, MAX_MODEL_JSON)
        try:
            return cls.from_dict(data)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {error}") from error

    def to_json(self) -> str:
        """The text of `config.json`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


# Far beyond any model of this kind, and far below what exhausts a machine that only reads a file.
_LIMITS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, 2**16),
    "intermediate_size": (1, 2**18),
    "num_hidden_layers": (1, 1000),
    "num_attention_heads": (1, 2**12),
    "max_position_embeddings": (1, 2**30),
    "num_labels": (1, 2**17),
    "local_attention": (0, 2**30),
}
# The keys of a config.json that hold objects.
_OBJECTS = ("rope_parameters", "rope_scaling", "label2id")
_KINDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
DROPOUTS = (
    "embedding_dropout",
    "attention_dropout",
    "attention_out_dropout",
    "mlp_dropout",
    "classifier_dropout",
)


def check_size(name: str, value: Any) -> None:
    """Raises ValueError unless a value is a size that a model may have."""
    least, most = _LIMITS[name]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least else "an integer of at least 0"
        raise ValueError(f"{name}: expected {kind}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name}: expected at most {most:,}, got {shown(value)}")


def _check_type(name: str, annotation: Any, value: Any) -> None:
    """Raises ValueError unless a value fits the annotation of its field."""
    kinds = typing.get_args(annotation) or (annotation,)
    if typing.get_origin(annotation) is tuple or (value is None and type(None) in kinds):
        return  # the entries of tuples are checked where they are used
    kind = kinds[0]
    good = isinstance(value, int | float if kind is float else kind)
    good = good and isinstance(value, bool) == (kind is bool)
    if kind is float:  # also refuses NaN, and an integer that is too large for a float
        number: Any = value
        good = good and -1e300 < number < 1e300
    if not good:
        also = " or null" if type(None) in kinds else ""
        raise ValueError(f"{name}: expected {_KINDS[kind]}{also}, got {shown(value)}")


def _every_n(num_layers: int, n: int) -> tuple[str, ...]:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"global_attn_every_n_layers: expected a positive integer, got {shown(n)}")
    return tuple(SLIDING if i % n else FULL for i in range(num_layers))


def label_names(id2label: Any) -> tuple[str, ...]:
    """Returns the names in order of {id: name}, whose ids may be text; a sequence is the names.

    Raises ValueError unless the ids are 0, 1, 2 and so on.
    """
    if isinstance(id2label, str) or not isinstance(id2label, Iterable):
        raise ValueError(f"id2label: expected {{id: name}}, got {shown(id2label)}")
    names = tuple(id2label.values() if isinstance(id2label, Mapping) else id2label)
    if bad := [name for name in names if isinstance(name, Mapping | list | tuple)]:
        raise ValueError(f"id2label: expected names, got {shown(bad[0])}")
    if not isinstance(id2label, Mapping):
        return names
    by_id = {int(i) if str(i).isdecimal() else i: name for i, name in id2label.items()}
    if set(by_id) != set(range(len(id2label))):
        ids = printable(", ".join(str(i) for i in id2label))
        raise ValueError(f"id2label: expected the ids 0 to {len(id2label) - 1}, got {ids}")
    return tuple(by_id[i] for i in range(len(by_id)))


def init_std(config: ModernBertConfig, kind: str) -> float:
    """Returns the initial standard deviation of a weight of a kind: in, out, embedding, classifier.

    Source: `_init_weights` of transformers (ModernBERT's full_megatron scheme).
    """
    if kind == "out":
        return config.initializer_range / math.sqrt(2.0 * config.num_hidden_layers)
    if kind == "classifier":
        return config.hidden_size**-0.5
    return config.initializer_range
