"""The corpus of the pico checkpoints: the Python source of CPython's standard library (PSF License Version 2).

Files fall into three splits by a hash of their path, whole files only: `validation` chooses the checkpoint, `heldout`
is measured once and published, everything else is `train`. Both measured splits hold library code; the standard
library's own tests are used for training only, and the tests of a measured module (`test_<module>.py`) are dropped.

Left out: files that are not UTF-8 or do not parse, tables (`encodings`, `pydoc_data`, and files that are mostly digits
and punctuation), build-specific files (`_sysconfigdata*`, `config-*`), exact duplicates.
"""

import ast
import hashlib
import itertools
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = 4096
CONTEXT = 1024

HELDOUT_HEADER = re.compile(r"^# ===== held-out file: (?P<path>\S+) =====\n", re.MULTILINE)
# A line break takes the indentation after it, so that a prompt ending in an indented empty line splits as in training.
_PIECES = r"\s*\n[ \t]*|[^\s\p{L}\p{N}]?\p{L}+| \p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__", "lib-dynload"}
)
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
_VALIDATION_PERCENT, _HELDOUT_PERCENT = 3, 5
_TABLE_BELOW = 0.7  # share of letters, underscores, spaces and newlines under which a file counts as a table


@dataclass(frozen=True)
class Document:
    path: str  # relative to the standard library, with forward slashes
    text: str


@dataclass
class Corpus:
    train: list[Document] = field(default_factory=list)
    validation: list[Document] = field(default_factory=list)
    heldout: list[Document] = field(default_factory=list)

    def digest(self) -> str:
        """Identifies the exact text, so that a retrained checkpoint can tell that its corpus differs."""
        sha = hashlib.sha256()
        for split in (self.train, self.validation, self.heldout):
            for document in split:
                sha.update(f"{document.path}\0{document.text}\0".encode())
        return sha.hexdigest()


def bucket(path: str) -> int:
    """0..99, from the path alone, so that a file never changes split."""
    return int(hashlib.sha256(path.encode()).hexdigest()[:8], 16) % 100


def read_corpus(stdlib: Path | None = None) -> Corpus:
    """Reads and splits the standard library of the running Python (or of the folder `stdlib`)."""
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    corpus, tests, seen = Corpus(), [], set()
    for document in _readable(stdlib):
        digest = hashlib.sha256(document.text.encode()).digest()
        if digest in seen:
            continue
        seen.add(digest)
        place = bucket(document.path)
        if _TEST_FOLDERS & set(document.path.split("/")):
            tests.append(document)
        elif place < _VALIDATION_PERCENT:
            corpus.validation.append(document)
        elif place < _VALIDATION_PERCENT + _HELDOUT_PERCENT:
            corpus.heldout.append(document)
        else:
            corpus.train.append(document)
    measured = {f"test_{Path(d.path).stem}.py" for d in corpus.validation + corpus.heldout}
    corpus.train.extend(d for d in tests if Path(d.path).name not in measured)
    return corpus


def _readable(stdlib: Path) -> Iterator[Document]:
    for file in sorted(stdlib.rglob("*.py")):
        relative = file.relative_to(stdlib)
        if _SKIPPED_FOLDERS & set(relative.parts) or relative.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = file.read_bytes().decode("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the tests hold invalid escapes on purpose
                ast.parse(text)
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue
        if len(text) < 64 or len(re.findall(r"[A-Za-z_ \n]", text)) < _TABLE_BELOW * len(text):
            continue
        yield Document(relative.as_posix(), text)


def shared_lines(train: Iterable[Document], measured: Iterable[Document], longer_than: int = 40) -> float:
    """Share of the measured files' longer lines that also stand somewhere in the training files."""
    known = {line.strip() for d in train for line in d.text.splitlines()}
    lines = [s for d in measured for line in d.text.splitlines() if len(s := line.strip()) > longer_than]
    return sum(line in known for line in lines) / max(1, len(lines))


def select_heldout(documents: Sequence[Document], limit: int = 100_000) -> list[Document]:
    """Whole held-out files of moderate length, in the order of their hashes, up to `limit` bytes together."""
    chosen, size = [], 0
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        length = len(document.text.encode())
        if 2_000 <= length <= 30_000 and size + length <= limit:
            chosen.append(document)
            size += length
    return chosen


def select_calibration(corpus: Corpus, limit: int = 40_000) -> list[Document]:
    """Whole training files of library code, in the order of their hashes, up to `limit` bytes together.

    Files that share a run of lines with a measured file (licence headers, idioms) are left out.
    """
    measured = {run for d in corpus.validation + corpus.heldout for run in line_runs(d.text)}
    chosen, size = [], 0
    for document in sorted(corpus.train, key=lambda d: hashlib.sha256(d.path.encode()).digest()):
        length = len(document.text.encode())
        library = not _TEST_FOLDERS & set(document.path.split("/"))
        fits = 1_000 <= length <= 10_000 and size + length <= limit
        if library and fits and document.text.isascii() and not measured & set(line_runs(document.text)):
            chosen.append(document)
            size += length
    return chosen


def line_runs(text: str, length: int = 3) -> list[tuple[str, ...]]:
    """All runs of so many lines, blank ones left out."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [tuple(lines[i : i + length]) for i in range(len(lines) - length + 1)]


def format_calibration(documents: Iterable[Document]) -> str:
    return "".join(f"# ===== training file: {d.path} =====\n{d.text}" for d in documents)


def format_heldout(documents: Iterable[Document]) -> str:
    return "".join(f"# ===== held-out file: {d.path} =====\n{d.text}" for d in documents)


def parse_heldout(text: str) -> list[Document]:
    """The inverse of `format_heldout`."""
    parts = HELDOUT_HEADER.split(text)
    if len(parts) < 3 or parts[0]:
        raise ValueError("no '# ===== held-out file: <path> =====' line at the start of the held-out text")
    return [Document(path, body) for path, body in zip(parts[1::2], parts[2::2], strict=True)]


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text survives encoding and decoding. `bos` is put before every text, nothing after it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], cut_every: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """One stream of `bos text eos` per document, and where each document starts (with the end as a last entry).

    With `cut_every`, a text is encoded in pieces that end at random places, one in so many characters and half of them
    after white space: the model learns to go on from prompts that end inside what would be one token (`def `).
    """
    rows = []
    for document in documents:
        pieces = tokenizer(list(_cut(document, cut_every)), add_special_tokens=False, verbose=False)["input_ids"]
        rows.append(np.array([BOS_ID, *(i for piece in pieces for i in piece), EOS_ID], dtype=np.uint16))
    starts = np.cumsum([0, *(len(row) for row in rows)], dtype=np.int64)
    return np.concatenate(rows), starts


def _cut(document: Document, every: int) -> Iterator[str]:
    text = document.text
    places: list[int] = []
    if every:
        chance = random.Random(document.path)
        for _ in range(len(text) // every):
            place = chance.randrange(1, len(text))
            if chance.random() < 0.5:
                space = re.compile(r"[ \n]+").search(text, place)
                place = space.end() if space else place
            places.append(place)
    edges = sorted({0, *places, len(text)})
    return (text[a:b] for a, b in itertools.pairwise(edges))
