"""Quality cards: what is measured, the files, who is shown beside, and cards of strangers."""

import json
from pathlib import Path
from typing import Any

import pytest
from terminal import needs_jit, run_here

from localv4.cli import card_page, card_plot
from localv4.engine import quality_card
from localv4.engine.quality_card import Card, comparable_cards, neighbours, read_card
from localv4.errors import BadFileError, NotFoundError

TEXT = Path(__file__).parent / "golden" / "heldout.txt"


def figure(value: float, error: float | None = 0.1) -> dict[str, float | None]:
    """A figure of a card."""
    return {"value": value, "standard_error": error}


def divergence(mean: float) -> dict[str, Any]:
    """A divergence of a card."""
    return {
        "tokens": 100,
        "mean": figure(mean, mean / 10),
        "percentiles": {"50": mean / 2, "99.9": 4 * mean},
        "maximum": 5 * mean,
        "same_top": figure(0.95, 0.01),
        "rms_delta_p": figure(0.02, 0.001),
        "mean_delta_p": figure(-0.001, 0.0005),
        "perplexity": figure(60.0),
        "base_perplexity": figure(59.0),
        "perplexity_ratio": figure(60 / 59, 0.002),
    }


def document(
    model: str = "tiny-q4", nbytes: int = 9 << 20, mean: float | None = 0.04
) -> dict[str, Any]:
    """A card as JSON values."""
    base = {
        "name": "tiny-v4",
        "numerics": "exact",
        "bytes_per_token": 13 << 20,
        "context": 64,
        "windows": 2,
        "divergence": divergence(1.0 if mean is None else mean),
        "floor_windows": 1,
        "rounding": divergence(0.001),
    }
    return {
        "schema": 1,
        "tool": "localv4 0.1.0",
        "model": model,
        "numerics": "fast",
        "bytes": 2 * nbytes,
        "bytes_per_token": nbytes,
        "manifest": None,
        "text": {"name": "a.txt", "sha256": "0" * 64, "tokens": 1234},
        "bos": True,
        "perplexity": [
            {
                "context": 64,
                "windows": 2,
                "tokens": 62,
                "perplexity": figure(60.0),
                "standard_error_between_windows": None,
                "rounding_floor": {"windows": 1, "relative_change": figure(0.001, 0.002)},
                "curve": [
                    {"tokens_before": [1, 15], "tokens": 30, "perplexity": figure(200.0, 50.0)},
                    {"tokens_before": [16, 31], "tokens": 32, "perplexity": figure(90.0, 9.0)},
                    {"tokens_before": [32, 63], "tokens": 64, "perplexity": figure(70.0, 7.0)},
                ],
            }
        ],
        "base": None if mean is None else base,
    }


def make(**changes: Any) -> Card:
    """A card."""
    return Card.model_validate(document(**changes))


def put(folder: Path, card: dict[str, Any]) -> Path:
    """Write a card into a model's folder."""
    place = folder / quality_card.FOLDER
    place.mkdir(parents=True)
    (place / quality_card.FILE).write_text(json.dumps(card))
    return place


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    place = put(tmp_path, document())
    card = read_card(place)
    assert card == make()
    assert json.loads(card.model_dump_json(by_alias=True)) == document()
    with pytest.raises(NotFoundError):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema",), 2),
        (("model",), "x" * 201),
        (("bytes",), -1),
        (("bytes",), "12"),
        (("manifest",), "0" * 63),
        (("perplexity",), []),
        (("perplexity", 0, "curve"), [{}]),
        (("perplexity", 0, "perplexity", "value"), float("nan")),
        (("base", "divergence", "mean"), None),
        (("text", "more"), 1),
        (("base",), "tiny"),
    ],
)
def test_cards_of_strangers(path: tuple[str | int, ...], value: Any, tmp_path: Path) -> None:
    card: Any = document()
    inner = card
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(BadFileError, match=r"card\.json"):
        read_card(put(tmp_path, card))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 100_000, "\xff"])
def test_what_is_no_card(text: str, tmp_path: Path) -> None:
    place = put(tmp_path, {})
    (place / quality_card.FILE).write_text(text, encoding="latin-1")
    with pytest.raises(BadFileError):
        read_card(place)


def test_only_comparable_neighbours_are_shown(tmp_path: Path) -> None:
    own = put(tmp_path / "q4", document())
    put(tmp_path / "q2", document("tiny-q2", 8 << 20, 0.2))
    put(tmp_path / "other-text", document() | {"text": {**document()["text"], "sha256": "1" * 64}})
    put(tmp_path / "no-bos", document() | {"bos": False})
    (put(tmp_path / "damaged", document()) / quality_card.FILE).write_text("{")
    (tmp_path / "no-card").mkdir()
    found = list(comparable_cards(make(), own, neighbours(own)))
    assert [card.model for card in found] == ["tiny-q2"]
    gguf = quality_card.card_folder(tmp_path / "m.gguf")
    assert gguf.name == "m.quality-card"
    assert own in neighbours(gguf)


def test_divergences_from_another_base_are_no_points() -> None:
    other = document("tiny-q2", 8 << 20, 0.2)
    other["base"]["numerics"] = "fast"
    cards = [Card.model_validate(other), make(model="tiny-q8", nbytes=11 << 20, mean=0.001)]
    found = card_plot.points(make(), cards)
    assert [point.label.split("\n")[0] for point in found] == ["tiny-q4", "tiny-q8"]
    assert [point.value for point in found] == [0.04, 0.001]
    without = card_plot.points(make(mean=None), cards)
    assert [point.value for point in without] == [60.0, 60.0, 60.0]


@pytest.mark.parametrize("mean", [0.04, 0.0, None])
def test_the_picture_is_the_same_each_time(mean: float | None) -> None:
    others = [make(model="a$b", nbytes=8 << 30, mean=0.2)]
    first = card_plot.draw(make(mean=mean), others)
    assert first == card_plot.draw(make(mean=mean), others)
    assert first.lstrip().startswith(b"<?xml") and b"<path" in first


def test_the_page() -> None:
    other = make(model="<b>|q2", nbytes=8 << 20, mean=0.2)
    page = card_page.markdown(make(), [other])
    assert "# Quality of tiny-q4" in page
    assert "| 64 | 2 | 62 | 60.000 ± 0.100 | 0.100 ± 0.200 % |" in page
    assert "| mean, nats | 0.040000 ± 0.004000 | 0.001000 ± 0.000100 |" in page
    assert "| median | 0.020000 | 0.000500 |" in page
    beside = page.split("## Beside others")[1].splitlines()
    assert beside[4].startswith("| ?b??q2 | fast | 16.0 MiB | 8.0 MiB | 60.000 ± 0.100 | 0.2")
    assert beside[5].startswith("| **tiny-q4** |")
    alone = card_page.markdown(make(mean=None), [])
    assert "Divergence" not in alone.replace("divergences", "") and "Beside" not in alone


@needs_jit
def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "card"
    done = run_here(
        *("eval", "card", "-m", "tiny-v4", "--base-model", "tiny-v4", "--base-numerics", "exact"),
        *("-f", str(TEXT), "-c", "64,100", "-w", "2", "--floor-windows", "1", "-o", str(out)),
        home=tmp_path,
    )
    assert done.code == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "card.json", "quality.svg"]
    card = read_card(out)
    assert [one.context for one in card.perplexity] == [64, 100]
    assert card.base is not None and card.base.context == 64
    assert card.base.divergence.tokens == 2 * 31
    mean = card.base.divergence.mean.value
    assert mean is not None and 0 < mean < 0.05
    assert 0 < card.bytes_per_token < card.bytes
    page = (out / "README.md").read_text(encoding="utf-8")
    assert "Divergence from tiny-v4" in page


def test_refusals(tmp_path: Path) -> None:
    done = run_here("eval", "card", "-m", "tiny-v4", home=tmp_path)
    assert done.code == 2 and "--out" in done.stderr
    done = run_here("eval", "card", "-o", str(tmp_path / "a" / "b"), home=tmp_path)
    assert done.code == 1 and "there is no folder" in done.stderr
    (tmp_path / "file").touch()
    done = run_here("eval", "card", "-o", str(tmp_path / "file"), home=tmp_path)
    assert done.code == 1 and "cannot write" in done.stderr


def test_show_names_the_card(tmp_path: Path) -> None:
    model = tmp_path / "model"
    place = put(model, document())
    (model / "manifest.json").write_text("{}")
    rows = dict(card_page.section(model))
    assert rows["perplexity @ 64"] == "60.000 ± 0.100, a.txt"
    assert rows["same likeliest token"] == "95.00 ± 1.00 %"
    assert rows["card"] == str(place / "README.md")
    assert card_page.document(model) == document()
    assert "attention" in rows  # the card is of a model without a manifest
    changed = document() | {"manifest": quality_card.manifest_digest(model)}
    (place / quality_card.FILE).write_text(json.dumps(changed))
    assert "attention" not in dict(card_page.section(model))
    (place / quality_card.FILE).write_text("{")
    assert list(dict(card_page.section(model))) == ["card"]
    assert card_page.document(model) is None
    assert card_page.section(tmp_path) == []
