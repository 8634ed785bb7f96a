"""Finds the tensors with a row or an entry for each token, and the entries of a configuration that count tokens.

The knowledge is that of the model's class in transformers: the model is built without weights, once as it is configured
and once with another number of tokens, and the tensors whose shapes differ are those that are sought.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from resm_kernels.checkpoint import TensorInfo
from resm_kernels.engine.architecture import Architecture, find_architecture
from resm_kernels.engine.models import MergeError, Model
from resm_kernels.tensor_names import is_vocabulary, layer_position, unnumbered

Path = tuple[str, ...]
"""Where an entry of a configuration stands: the names of its sections, and its own."""

_MORE: Final = 8
"""By how many tokens a vocabulary is enlarged to see which tensors grow."""

_SIZE: Final = re.compile(r"(\w+_)?(vocab_size|n_words)(_per_layer_input)?")
_OF_TYPES: Final = re.compile(r"(\w*type|entity|composer|speakers|modality)_vocab_size")
_PER_LAYER: Final = "vocab_size_per_layer_input"
"""The number of tokens that have rows of their own in each layer (Gemma 3n); further tokens have the first row."""

_NO_TEXT: Final = re.compile(
    r"(?:^|_)(?:audio|vision|visual|image|speech|codebooks?|codec|qformer|vq|unit|t2u|char|acoustic|semantic|talker|mel"
    r"|token2wav)(?:_|$)"
)
"""Sections of configurations, and entries, whose vocabularies are not those of a tokenizer of text."""

_OUTPUTS: Final = ("decoder", "generator")
"""Sections that say what a model's output is, if there are other sections for its input."""

_NUMBERED: Final = re.compile(r"\.\d+\.")
_IN_LEFT_OUT_LAYERS: Final = re.compile(r"\.(?:embed_tokens|shared_head\.head)\.weight$")
"""Vocabulary in layers that transformers does not load: those of DeepSeek-V3 and GLM that predict further tokens."""


@dataclass(frozen=True)
class TokenTable:
    """How a tensor holds the rows of tokens.

    Attributes:
        axis: The dimension that they are counted in. Dimensions before it have one entry.
        further: How many rows after those of the tokens belong to no token; they stay the last ones.
        first_stands_in: True if tokens beyond the last row have the first row.
    """

    axis: int = 0
    further: int = 0
    first_stands_in: bool = False

    def tokens(self, info: TensorInfo) -> int:
        """Return how many rows of tokens a tensor has.

        Raises:
            MergeError: It has none, or several dimensions before them.
        """
        rows = info.shape[self.axis] - self.further if len(info.shape) > self.axis else 0
        if rows <= 0 or not info.numel or any(size != 1 for size in info.shape[: self.axis]):
            raise MergeError(f"{info.file}: tensor {info.name!r} has the shape {info.shape}, need rows of tokens")
        return rows


@dataclass(frozen=True)
class TokenTables:
    """The tensors of a model that follow its tokenizer.

    Attributes:
        by_name: Each of them by its name; in layers, by the name without the layer's number.
        sizes: The entries of the configuration that become the output's number of rows.
        sections: The sections of the configuration, () for the whole of it, in which rows of special tokens are rows
            of this vocabulary.
        aliases: Other names that such an entry may have in a config.json, by its name.
        others: Tensors that hold rows of other vocabularies, such as those of codebooks.
    """

    by_name: Mapping[str, TokenTable]
    sizes: tuple[Path, ...]
    sections: tuple[Path, ...]
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    def table(self, name: str) -> TokenTable | None:
        """Return how a tensor holds rows of tokens; None if it holds none."""
        return self.by_name.get(unnumbered(name))

    def rows(self, model: Model) -> int | None:
        """Return how many tokens have a row in a model's embedding and in its head; None if that is not known."""
        tables = [(info, self.table(name)) for name, info in model.reader.tensors.items()]
        return min((t.tokens(i) for i, t in tables if t is not None and not t.first_stands_in), default=None)

    @property
    def further(self) -> int:
        """The most rows that follow those of the tokens in one of the tensors."""
        return max((table.further for table in self.by_name.values()), default=0)

    @property
    def notes(self) -> tuple[str, ...]:
        """A line about the tensors of other vocabularies, if there are any."""
        if not self.others:
            return ()
        more = f" and {len(self.others) - 1} more" if len(self.others) > 1 else ""
        return (f"vocabulary: {self.others[0]!r}{more} have rows of another vocabulary, which stay where they are",)

    def set_sizes(self, config: dict[str, Any], rows: int) -> None:
        """Set the entries of a config.json that count the tokens."""
        for *sections, key in self.sizes:
            part = config
            for name in sections:
                # What a section called so says counts in old models with images, whatever the other one says.
                older = part.get(f"{name}_dict")
                if isinstance(older, dict):
                    older[key] = rows
                part = part.setdefault(name, {})
            for name in [name for name in (key, *self.aliases.get(key, ())) if name in part] or [key]:
                part[name] = rows


def find_token_tables(model: Model) -> TokenTables:
    """Return the tensors of a model that follow its tokenizer.

    If transformers has no class for the model, they are found by their names (`is_vocabulary`).
    """
    architecture = find_architecture(model.base_folder, model.config)
    found = None if architecture is None else _Search(architecture).tables(model.reader.tensors)
    return _by_names(model) if found is None else found


def _by_names(model: Model) -> TokenTables:
    tables = {
        name: TokenTable(axis=1 if len(info.shape) > 1 and info.shape[0] == 1 else 0)
        for name, info in model.reader.tensors.items()
        if is_vocabulary(name)
    }
    config, text = model.config, model.config.get("text_config")
    sections: dict[Path, Mapping[str, Any]] = {(): config}
    if isinstance(text, Mapping):
        sections["text_config",] = text
    sizes = [(*path, "vocab_size") for path, section in sections.items() if "vocab_size" in section]
    return TokenTables(tables, tuple(sizes), tuple(sections))


class _Search:
    """Looks for the tensors that follow a model's tokenizer.

    Args:
        architecture: The model's class.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._config = architecture.config
        self._shapes = architecture.shapes
        self._sizes = dict(_sizes(self._config))
        self._grown: dict[Path, dict[str, TokenTable | None]] = {}

    def tables(self, tensors: Mapping[str, TensorInfo]) -> TokenTables | None:
        """Return the tensors, by their names in `tensors`; None if no tensor follows an entry of the configuration."""
        main = self._main()
        followed = [] if main is None else [path for path in self._sizes if self._belongs(path, main)]
        tables = {name: table for path in followed for name, table in self._tensors_of(path).items()}
        others = {name for path in self._sizes for name in self._tensors_of(path)} - tables.keys()
        if not tables and not others:
            return None
        by_name: dict[str, TokenTable] = {}
        loaded = self._architecture.loaded(tensors)
        rows = None if main is None else (self._sizes[main],)
        for name, info in tensors.items():
            key = loaded[name].name
            if key in tables:
                table = tables[key]
                if table is None:
                    raise MergeError(
                        f"{info.file}: tensor {name!r} does not have one row for each token; vocabularies of such "
                        "models cannot be merged: remove tokenizer or tokenizer_source"
                    )
                by_name[unnumbered(name)] = table
            elif not loaded[name].known and _IN_LEFT_OUT_LAYERS.search(name) and info.shape[:1] == rows:
                by_name[unnumbered(name)] = TokenTable()
        return TokenTables(
            by_name=by_name,
            sizes=tuple(followed),
            sections=self._sections_of_text(followed),
            aliases=_aliases(self._config, followed),
            others=tuple(name for name in tensors if loaded[name].name in others),
        )

    def _main(self) -> Path | None:
        """Return the entry that counts the rows of the embedding which tokens of text are looked up in."""
        of_text = [path for path in self._sizes if not any(map(_NO_TEXT.search, path)) and self._is_plain(path)]
        embedding = self._embedding()
        text = _text_config(self._config)
        choices = (
            [path for path in of_text if embedding in self._tensors_of(path)]
            + [path for path in of_text if _section(self._config, path[:-1]) is text]
            + of_text
        )
        return choices[0] if choices else None

    def _is_plain(self, path: Path) -> bool:
        """Return True if tensors follow the entry, and none of them is one of several codebooks."""
        names = self._tensors_of(path)
        return bool(names) and not any(layer_position(n) is None and _NUMBERED.search(n) for n in names)

    def _belongs(self, path: Path, main: Path) -> bool:
        """Return True if an entry counts the tokens that `main` counts."""
        if path == main or path[-1] == _PER_LAYER:
            return True
        if path[-1] == "decoder_vocab_size" and not _shares_embeddings(_section(self._config, path[:-1])):
            return False
        same = self._sizes[path] == self._sizes[main] and not any(map(_NO_TEXT.search, path))
        return same and (not self._tensors_of(path) or self._is_plain(path))

    def _embedding(self) -> str | None:
        """Return the name of the weight that the class says its input is looked up in."""
        model = self._architecture.model
        try:
            weight = getattr(model.get_input_embeddings(), "weight", None)
        except (NotImplementedError, AttributeError):  # what classes without such an embedding raise
            return None
        return next((n for n, p in model.named_parameters(remove_duplicate=False) if p is weight), None)

    def _tensors_of(self, path: Path) -> Mapping[str, TokenTable | None]:
        """Return the tensors that grow with an entry; None for one that does not grow by a row for each token."""
        if path not in self._grown:
            size = self._sizes[path]
            equal = {other: size + _MORE for other in self._sizes if self._sizes[other] == size}
            before = self._shapes
            try:
                after = self._architecture.with_entries({path: size + _MORE}).shapes
            except ValueError:  # a class whose sections must agree
                after = self._architecture.with_entries(equal).shapes
            grown = {name for name in before if after.get(name) != before[name]}
            self._grown[path] = {name: self._table(before[name], after.get(name, ()), path) for name in grown}
        return self._grown[path]

    def _table(self, before: tuple[int, ...], after: tuple[int, ...], path: Path) -> TokenTable | None:
        changes = [(i, new - old) for i, (old, new) in enumerate(zip(before, after, strict=False)) if new != old]
        if len(before) != len(after) or len(changes) != 1 or changes[0][1] != _MORE:
            return None
        axis, further = changes[0][0], before[changes[0][0]] - self._sizes[path]
        if further < 0 or any(size != 1 for size in before[:axis]):
            return None
        return TokenTable(axis, further, first_stands_in=path[-1] == _PER_LAYER)

    def _sections_of_text(self, followed: Sequence[Path]) -> tuple[Path, ...]:
        """Return the sections of the configuration in which special tokens are tokens of this vocabulary."""
        own = {path[:-1] for path in followed}
        outputs = [path for path in self._sizes if path[0] in _OUTPUTS and len(path) > 1]
        if outputs and not any(path in followed for path in outputs):
            return tuple(own)
        return tuple({path[:i]: None for path in followed for i in range(len(path))})


def _sizes(config: Any, at: Path = ()) -> Iterator[tuple[Path, int]]:
    """Yield the entries of a configuration that count tokens, those of the whole before those of its sections."""
    from transformers import PreTrainedConfig

    for key, value in vars(config).items():
        if isinstance(value, int) and value > 0 and _SIZE.fullmatch(key) and not _OF_TYPES.fullmatch(key):
            yield (*at, key), value
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from _sizes(value, (*at, key))


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # there are several
        return None


def _section(config: Any, path: Path) -> Any:
    return functools.reduce(getattr, path, config)


def _shares_embeddings(config: Any) -> bool:
    """Return False for a translator (Marian) whose two languages have a vocabulary each."""
    return bool(getattr(config, "share_encoder_decoder_embeddings", True))


def _aliases(config: Any, paths: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    """Return other names of entries that a config.json may have, by the name in the configuration."""
    found: dict[str, tuple[str, ...]] = {}
    for *sections, key in paths:
        names = _section(config, tuple(sections)).attribute_map
        found[key] = (*found.get(key, ()), *(alias for alias, name in names.items() if name == key))
    return found
