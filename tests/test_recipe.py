"""Recipes: what they may say, which rule decides, and what a shape makes of it."""

from pathlib import Path

import pytest

from localv4.errors import BadFileError, NotFoundError, UsageError
from localv4.storage.recipe_files import NAMES
from quant.choice import choose_ggml, choose_packed
from quant.recipe import Recipe, Rule, load_recipe
from quant.tensor_class import TensorClass, class_of, layer_of


def rule(*formats: str, **fields: object) -> Rule:
    return Rule.model_validate({"tensors": ["gate_up"], "formats": list(formats), **fields})


# --- files


@pytest.mark.parametrize("name", NAMES)
def test_built_in_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.summary
    assert recipe.needs_routing == (name == "mixed")
    kinds = (TensorClass.ROUTER, TensorClass.COMPRESSOR, TensorClass.HYPER_CONNECTIONS)
    assert all(recipe.rule_for(kind, 1, 4) is None for kind in kinds)  # too small to gain by


def test_a_recipe_of_a_user(tmp_path: Path) -> None:
    path = tmp_path / "Mine.toml"
    path.write_text(
        'summary = "s"\n[[rules]]\ntensors = ["down"]\nlayers = "first 2, 7"\n'
        'formats = ["Q3", "keep"]\ngguf = ["IQ4_XS"]\nmethod = "round"\nhottest = 0.5\n'
    )
    recipe = load_recipe(str(path))
    assert recipe.name == "mine"
    found = recipe.rule_for(TensorClass.DOWN, 7, 43, heat=0.5)
    assert found is not None and found.method == "round" and found.gguf == ["IQ4_XS"]
    assert recipe.rule_for(TensorClass.DOWN, 7, 43, heat=0.51) is None
    assert recipe.rule_for(TensorClass.DOWN, 2, 43, heat=0.1) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("summary = ", "not valid TOML"),
        ("", "summary: is missing"),
        ('summary = "s"\ncolor = 3', "color: no such key"),
        (
            'summary = "s"\n[[rules]]\ntensor = ["head"]\nformats = ["Q4"]',
            r'rule 1, tensor: no such key; did you mean "tensors"\? \(and 1 more\)',
        ),
        ('name = "x"\nsummary = "s"', "has the name of its file"),
        ('summary = "s"\n[[rules]]\nformats = ["Q4"]', "rule 1, tensors: is missing"),
        ('summary = "s"\n[rules]\nformats = ["Q4"]', r"rules: expected a list: \[\[\.\.\.\]\] for"),
        ("summary = 3", "summary: expected a text in quotes, not 3"),
        (
            'summary = "s"\n[[rules]]\ntensors = "head"\nformats = ["Q4"]',
            r'rule 1, tensors: expected a list: \["head"\]',
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head", "heads"]\nformats = ["Q4"]',
            r"""rule 1, tensor 2: "heads" is not 'embedding'.* did you mean "head"\?""",
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q5"]',
            r'rule 1, formats: "Q5" is not one of keep, IQ2, Q2, .*, B16\)$',
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q4"]\ngguf = ["Q4"]',
            '"Q4" is not one of keep, IQ2_XXS',
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["q4_k"]',
            r'rule 1, formats: "q4_k" is not one of .* did you mean "Q4K"\?',
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = []',
            "rule 1, formats: List should have at least 1",
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q4"]\nlayers = "some"',
            '"some" is not all, first N',
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q4"]\nhottest = 0.5',
            "hottest is about routed experts",
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["down"]\nformats = ["Q4"]\nhottest = 1.5',
            "rule 1, hottest: 1.5: Input should be less than 1",
        ),
        (
            'summary = "s"\n[[rules]]\ntensors = ["head"]\nformats = ["Q4"]\nmethod = "serch"',
            r'rule 1, method: "serch" is not .* did you mean "search"\?',
        ),
        ("x = " + "[\n" * 50_000, "not valid TOML: nested too deeply"),
        ("[" * 5000, "line 1 is longer than 500 characters"),
    ],
)
def test_a_wrong_recipe(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(BadFileError, match=problem) as caught:
        load_recipe(str(path))
    assert "\n" not in caught.value.message


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r'no recipe "q5"$'):
        load_recipe("q5")
    with pytest.raises(UsageError, match='no recipe "lossles"; did you mean "lossless"'):
        load_recipe("lossles")
    with pytest.raises(NotFoundError):
        load_recipe(str(tmp_path / "none.toml"))
    (tmp_path / "a b.toml").write_text('summary = "s"')
    with pytest.raises(BadFileError, match="the name of a recipe"):
        load_recipe(str(tmp_path / "a b.toml"))


# --- rules


def test_the_last_rule_decides() -> None:
    recipe = Recipe(
        summary="s",
        rules=[rule("Q2"), rule("Q3", layers="first 1, last 2"), rule("Q8", layers="8")],
    )

    def formats(layer: int) -> list[str]:
        found = recipe.rule_for(TensorClass.GATE_UP, layer, 10)
        assert found is not None
        return found.formats

    assert [formats(layer)[0] for layer in (0, 1, 7, 8, 9)] == ["Q3", "Q2", "Q2", "Q8", "Q3"]
    assert recipe.rule_for(TensorClass.DOWN, 0, 10) is None


@pytest.mark.parametrize(
    ("span", "layers"),
    [
        ("all", [0, 1, 2, 3, 4, 5]),
        ("first 2", [0, 1]),
        ("last 3", [3, 4, 5]),
        ("2-4", [2, 3, 4]),
        ("0, 5", [0, 5]),
        ("4-2", []),
    ],
)
def test_spans_of_layers(span: str, layers: list[int]) -> None:
    found = rule("Q4", layers=span)
    assert [n for n in range(6) if found.covers(TensorClass.GATE_UP, n, 6)] == layers


def test_what_is_in_no_layer_needs_the_span_all() -> None:
    for span, covered in (("all", True), ("first 2", False)):
        found = Rule.model_validate({"tensors": ["head"], "formats": ["Q6"], "layers": span})
        assert found.covers(TensorClass.HEAD, None, 6) is covered


def test_classes_of_names() -> None:
    assert class_of("layers.3.ffn.experts.17.w2.weight") is TensorClass.DOWN
    assert class_of("layers.3.attn.indexer.compressor.wkv.weight") is TensorClass.COMPRESSOR
    assert class_of("layers.3.attn.indexer.wq_b.weight") is TensorClass.INDEXER
    assert class_of("hc_head_fn") is TensorClass.HYPER_CONNECTIONS
    assert (layer_of("layers.12.attn.wkv.weight"), layer_of("head.weight")) == (12, None)
    with pytest.raises(ValueError, match="no matrix"):
        class_of("layers.3.attn_norm.weight")


# --- what a shape makes of a wish


@pytest.mark.parametrize(
    ("wishes", "rows", "cols", "kept_bits", "found", "note"),
    [
        (["Q3"], 256, 512, 16.0, "Q3", ""),
        (["Q3"], 256, 128, 16.0, "MX4", "256 x 128 does not fit Q3"),
        (["Q3", "Q8"], 256, 128, 16.0, "Q8", "256 x 128 does not fit Q3"),
        (["Q3"], 256, 64, 16.0, "Q4", "256 x 64 does not fit Q3"),
        (["Q6"], 4, 256, 32.0, "B16", "4 x 256 does not fit Q6"),
        (["Q6"], 4, 256, 16.0, None, "4 x 256 does not fit Q6"),
        (["MX4"], 256, 512, 4.25, None, "as small as MX4 already"),
        (["Q3"], 256, 128, 4.25, None, "256 x 128 does not fit Q3"),
        (["Q2"], 256, 512, 2.125, None, "as small as Q2 already"),
        (["keep"], 256, 512, 16.0, None, ""),
        (["Q3", "keep"], 256, 100, 16.0, None, ""),
        (["B16"], 10, 7, 32.0, None, "10 x 7 fits no format"),
    ],
)
def test_fallbacks(
    wishes: list[str], rows: int, cols: int, kept_bits: float, found: str | None, note: str
) -> None:
    choice = choose_packed(rule(*wishes), TensorClass.GATE_UP, rows, cols, kept_bits)
    assert (choice.target.name if choice.target else None, choice.note) == (found, note)


def test_the_embedding_stays_rows() -> None:
    choice = choose_packed(rule("Q6"), TensorClass.EMBEDDING, 100, 512, 16.0)
    assert choice.target is not None and choice.target.name == "Q6_K"


def test_hyper_connections_are_never_rounded() -> None:
    for choose in (choose_packed, choose_ggml):
        assert choose(rule("Q8"), TensorClass.HYPER_CONNECTIONS, 32, 512, 32.0).target is None


@pytest.mark.parametrize(
    ("formats", "gguf", "cols", "found"),
    [
        (["Q4"], [], 512, "Q4_0"),
        (["Q4K"], [], 512, "Q4_K"),
        (["Q4K"], [], 128, "Q8_0"),
        (["Q4K", "Q4"], [], 128, "Q4_0"),
        (["Q2"], ["IQ4_XS"], 512, "IQ4_XS"),
        (["Q3"], ["Q3_K", "keep"], 128, None),
    ],
)
def test_kin_in_gguf(formats: list[str], gguf: list[str], cols: int, found: str | None) -> None:
    choice = choose_ggml(rule(*formats, gguf=gguf), TensorClass.GATE_UP, 256, cols, 16.0)
    assert (choice.target.name if choice.target else None) == found
