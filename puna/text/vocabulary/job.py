"""The work of the stages ``tokenizer`` and ``vocabulary``: reading, building, writing, counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from puna.core.errors import PunaError
from puna.core.rows import corpus_kind, read_columns
from puna.core.stage import Context, Outcome
from puna.model.probe import difference, probe
from puna.text import pretrained
from puna.text.tokenizer import Tokenizer
from puna.text.vocabulary import builders
from puna.text.vocabulary.apply import apply_map
from puna.text.vocabulary.extend import extend_tokenizer
from puna.text.vocabulary.operator import ORIGINS, VocabularyMap
from puna.text.vocabulary.train import train_tokenizer

if TYPE_CHECKING:
    from puna.model.llama import Llama
    from puna.text.stages import TokenizerParameters, VocabularyParameters

_TEXT_COLUMN = {"documents": "text", "sentence_pairs": "target_text"}
_EXAMPLES = 20


def make_tokenizer(context: Context, parameters: TokenizerParameters) -> Outcome:
    """Train or extend a tokenizer and compare how many tokens it and the model's need for a byte."""
    base = _tokenizer_of(context.inputs["model"]) if context.inputs.get("model") is not None else None
    texts = [text for folder in context.inputs["corpus"].values() for text in texts_of(folder)]
    if parameters.method == "train":
        made = train_tokenizer(
            texts,
            kind=parameters.kind,
            vocab_size=parameters.vocab_size,
            base=base,
            min_frequency=parameters.min_frequency if parameters.kind == "bpe" else None,
            single_digits=parameters.single_digits,
        )
    elif base is None:
        raise PunaError("to extend a tokenizer takes the model it belongs to", where="in.model", found="none")
    else:
        made = extend_tokenizer(
            base, texts, new_tokens=parameters.new_tokens, min_frequency=parameters.min_frequency
        )
    made.save(context.out / "tokenizer")
    others = {"base": base} if base is not None else {}
    others |= {name: _tokenizer_of(each) for name, each in _beside(context).items()}
    metrics = {"vocab_size": float(made.vocab_size)}
    measured = {"corpus": texts}
    for name, folder in (context.inputs.get("held_out") or {}).items():
        measured[f"held_out.{name}"] = list(texts_of(folder))
    rows = []
    for name, sample in measured.items():
        found = _tokens_per_byte(sample, {"new": made, **others})
        metrics |= {f"tokens_per_byte.{name}.{which}": value for which, value in found.items()}
        metrics[f"not_restored.{name}"] = float(_not_restored(made, sample))
        if base is not None:
            metrics[f"fewer_tokens.{name}"] = 1 - found["new"] / found["base"]
        rows.append([name, *(f"{value:.4f}" for value in found.values())])
    columns = ["text", "new tokenizer", *("the model's own" if name == "base" else name for name in others)]
    context.report["tables"] = [
        {"title": "Tokens per byte", "columns": columns, "rows": rows},
        _special_table(base, made),
    ]
    return Outcome({"tokenizer": context.out / "tokenizer"}, metrics)


def _beside(context: Context) -> dict[str, Any]:
    """The tokenizers that are measured beside, by names that say which is meant."""
    found: dict[str, Any] = context.inputs.get("beside") or {}
    if taken := {"new", "base"} & set(found):
        raise PunaError(
            "this name is taken", where="in.beside", found=taken.pop(), fix="give it another name"
        )
    return found


def change_vocabulary(context: Context, parameters: VocabularyParameters) -> Outcome:
    """Build the map, apply it, and write the model, the map and what its rows are made of."""
    model = pretrained.load(
        context.inputs["model"], dtype=parameters.dtype or context.dtype, device=context.device
    )
    old = model.tokenizer
    if old is None:
        raise PunaError("this model has no tokenizer to map from", where=context.inputs["model"])
    new = old
    if context.inputs.get("tokenizer") is not None:
        new = _tokenizer_of(context.inputs["tokenizer"])
    elif parameters.builder not in ("identity", "unpadded"):
        raise PunaError("this builder needs a tokenizer", where="in.tokenizer", found="none")
    if parameters.builder in ("identity", "unpadded") and new.vocabulary() != old.vocabulary():
        raise PunaError(
            f"{parameters.builder} keeps the vocabulary, and this tokenizer has another", where="in.tokenizer"
        )
    pairs = [pair for folder in (context.inputs.get("pairs") or {}).values() for pair in _pairs(folder)]
    mapping = _build(parameters, old, new, pairs, rows=model.spec.vocab_size, run_seed=context.seed)
    unmoved = _identity_difference(model, old)  # now, while no second model is held beside the first
    mapped = apply_map(model, mapping, new, pad_to_multiple=parameters.pad_to_multiple)
    pretrained.save(mapped, context.out / "model")
    mapping.save(context.out / "mapping")
    counted = [[name, f"{mapping.count(name):,}"] for name in ORIGINS if mapping.count(name)]
    padded = mapped.spec.vocab_size - mapping.new_size
    context.report["tables"] = [
        {"title": "Rows of the new vocabulary", "columns": ["made from", "rows"], "rows": counted},
        _special_table(old, new),
        *([_aligned_table(mapping, old, new)] if mapping.count("aligned") else []),
    ]
    metrics = {
        "identity_difference": unmoved,
        **mapping.metrics(),
        "vocab_size": float(mapped.spec.vocab_size),
        "rows.padded": float(padded),
    }
    return Outcome({"model": context.out / "model", "mapping": context.out / "mapping"}, metrics)


def _identity_difference(model: Llama, tokenizer: Tokenizer) -> float:
    """How far the identity map moves the model's logits on a fixed probe: 0.0, to the bit."""
    unchanged = apply_map(model, builders.identity(model.spec.vocab_size), tokenizer)
    return difference(probe(model), probe(unchanged))


def _build(
    parameters: VocabularyParameters,
    old: Tokenizer,
    new: Tokenizer,
    pairs: list[tuple[str, str]],
    *,
    rows: int,
    run_seed: int,
) -> VocabularyMap:
    name = parameters.builder
    if (name == "alignment") != bool(pairs):
        found = f"{len(pairs):,} pairs"
        raise PunaError(
            f"builder {name!r} takes " + ("no pairs" if pairs else "pairs"), where="in.pairs", found=found
        )
    if name == "alignment":
        return builders.alignment(
            old,
            new,
            pairs,
            fallback=parameters.fallback,
            evidence=parameters.evidence,
            floor=parameters.floor,
            position=parameters.position,
            symmetrisation=parameters.symmetrisation,
            iterations=parameters.iterations,
        )
    if name in ("identity", "unpadded"):
        return builders.identity(rows if name == "identity" else old.vocab_size)
    if name == "random":
        seed = run_seed if parameters.seed is None else parameters.seed
        return builders.random(
            old, new, distribution=parameters.distribution, seed=seed, copy_shared=parameters.copy_shared
        )
    if name == "global_mean":
        return builders.global_mean(old, new, copy_shared=parameters.copy_shared)
    return (builders.mean_of_pieces if name == "mean_of_pieces" else builders.weighted_pieces)(old, new)


def _tokenizer_of(source: Any) -> Tokenizer:
    path = pretrained.locate(source)
    found = pretrained.read_tokenizer(path)
    if found is None:
        raise PunaError("no tokenizer here", where=path, expected="tokenizer.json, or a GGUF file")
    return found


def texts_of(folder: Any) -> Iterator[str]:
    """The texts of a corpus of documents, or what the target side of a corpus of pairs says."""
    kind = corpus_kind(folder)
    if kind not in _TEXT_COLUMN:
        expected = " or ".join(_TEXT_COLUMN)
        raise PunaError(
            "a tokenizer is not trained on such a corpus", where=folder, found=kind, expected=expected
        )
    for (text,) in read_columns(folder, [_TEXT_COLUMN[kind]]):
        yield text


def _pairs(folder: Any) -> list[tuple[str, str]]:
    kind = corpus_kind(folder)
    if kind != "sentence_pairs":
        raise PunaError(
            "words are aligned in sentence pairs", where=folder, found=kind, expected="sentence_pairs"
        )
    return [(source, target) for source, target in read_columns(folder, ["source_text", "target_text"])]


def _tokens_per_byte(texts: list[str], tokenizers: Mapping[str, Tokenizer]) -> dict[str, float]:
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise PunaError("there is no text to measure the tokenizer on", where="in")
    return {name: sum(map(len, found.encode_batch(texts))) / size for name, found in tokenizers.items()}


def _not_restored(tokenizer: Tokenizer, texts: list[str]) -> int:
    encoded = tokenizer.encode_batch(texts)
    return sum(tokenizer.decode(ids) != text for ids, text in zip(encoded, texts, strict=True))


def _special_table(old: Tokenizer | None, new: Tokenizer) -> dict[str, Any]:
    """Every special token with its old and new id."""
    known = old.vocabulary() if old is not None else {}
    rows = [[token, str(known.get(token, "")), str(new.id_of(token))] for token in new.special_tokens]
    return {"title": "Special tokens", "columns": ["token", "old id", "new id"], "rows": rows}


def _aligned_table(mapping: VocabularyMap, old: Tokenizer, new: Tokenizer) -> dict[str, Any]:
    """The first aligned rows (the most frequent tokens of a trained vocabulary) with their largest shares."""
    rows = []
    for index in range(mapping.new_size):
        text = new.decode([index])
        if mapping.origin(index) == "aligned" and text[:1] == " " and text[1:].isalpha():
            shares = sorted(mapping.row(index).items(), key=lambda entry: -entry[1])[:3]
            made_of = ", ".join(f"{old.decode([column])!r} {share:.2f}" for column, share in shares)
            rows.append([repr(text), made_of])
        if len(rows) == _EXAMPLES:
            break
    return {
        "title": "Some aligned tokens",
        "columns": ["new token", "old tokens and their shares"],
        "rows": rows,
    }
