"""Verdicts and files of findings, and the measures of diversity behind them."""

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastldm.errors import CheckpointError, InputError
from fastldm.evaluation.shapes_grader import grade
from fastldm.evaluation.statistics import Score
from fastldm.reproduce import CLAIMS, pairs, reproduce
from fastldm.reproduce.finding import Finding, Measurement, judge, says
from fastldm.training.data import derive_seed
from fastldm.training.datasets.shapes import PLACES, SEEN_PAIRS, SIZES, Object, Scene, render


def finding(**changes):
    values = {
        "claim": "text-vs-class",
        "statement": "s",
        "holds": True,
        "verdict": "v",
        "measurements": [
            Measurement.of_score("accuracy", Score(3, 4), model="text", split="seen"),
            Measurement.of_score("accuracy", Score(1, 4), model="class", split="seen"),
        ],
        "settings": {"steps": 20},
    }
    return Finding(**{**values, **changes})


def drawn(pair, size, place, seed):
    picture = render(Scene((Object(pair[1], pair[0], size, place),)), seed)
    return pairs.Sample(pair, picture, grade(picture))


@pytest.mark.parametrize(
    ("interval", "margin", "holds"),
    [
        ((0.01, 0.2), 0, True),
        ((-0.2, -0.01), 0, False),
        ((-0.1, 0.1), 0, None),
        ((0.8, 0.9), 1, False),
        ((1.2, 1.4), 1, True),
        ((0.0, 0.1), 0, None),
        ((-0.1, 0.0), 0, False),
    ],
)
def test_a_claim_holds_only_where_its_interval_says_so(interval, margin, holds):
    assert judge(interval, margin) is holds


def test_verdicts_say_when_a_claim_does_not_hold():
    assert len({says(True), says(False), says(None)}) == 3
    assert "not" in says(False)
    assert "not" not in says(True)


def test_a_finding_comes_back_from_its_file(tmp_path):
    from fastldm.reproduce import text_vs_class

    rows = [
        Measurement.of_score("accuracy", Score(3, 4), model=model, split=split, attribute="all")
        for model in ("text", "class")
        for split in ("seen", "held-out")
    ]
    one = finding(measurements=rows)
    one.save(tmp_path / "new", text_vs_class.plot, Image.new("RGB", (8, 8)))
    assert Finding.load(tmp_path / "new") == one
    plots = (tmp_path / "new" / "plot.png").read_bytes()
    Finding.load(tmp_path / "new").save_plot(tmp_path / "again.png", text_vs_class.plot)
    assert (tmp_path / "again.png").read_bytes() == plots
    # Plain JSON, without NaN.
    json.loads((tmp_path / "new" / "finding.json").read_text(), parse_constant=pytest.fail)


def test_a_broken_finding_is_refused(tmp_path):
    (tmp_path / "finding.json").write_text('{"claim": "x"}')
    with pytest.raises(CheckpointError, match=r"finding\.json"):
        Finding.load(tmp_path)


def test_measurements_are_found_by_their_setting():
    assert [m.value for m in finding().select("accuracy", model="class")] == [0.25]
    assert len(finding().select("accuracy")) == 2
    assert finding().select("diversity") == []


def test_an_unknown_claim_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="text-vs-class"):
        reproduce("guidance-is-magic", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_line_knows_every_claim():
    from fastldm.cli.reproduce import CLAIMS as OFFERED

    assert tuple(OFFERED) == CLAIMS


def test_samples_are_graded_by_what_was_asked():
    right = drawn(("red", "circle"), "large", "top left", 0)
    assert right.right == {"count": True, "colour": True, "shape": True, "all": True}
    assert right.cell == ("large", "top left")
    wrong = pairs.Sample(("blue", "circle"), right.picture, right.shown)
    assert wrong.right == {"count": True, "colour": False, "shape": True, "all": False}
    assert pairs.score([right, wrong]) == Score(1, 2)
    assert pairs.score([right, wrong], "shape") == Score(2, 2)


def test_every_picture_has_noise_of_its_own_whatever_its_batch():
    calls = []

    def pipeline(prompt, generator, **options):
        calls.append([g.initial_seed() for g in generator])
        return SimpleNamespace(images=[render(pairs.scene_of(pair), 0) for pair in prompt])

    wanted = pairs.repeated(SEEN_PAIRS, 7)
    samples = pairs.sample(
        pipeline, wanted, lambda some: {"prompt": some}, seed=3, description="", progress=False
    )
    assert [s.pair for s in samples] == wanted
    seeds = [seed for call in calls for seed in call]
    assert len(calls) > 2
    assert len(set(seeds)) == len(wanted)
    assert seeds == [derive_seed(3, index) for index in range(len(wanted))]


def test_diversity_is_the_probability_that_two_right_pictures_differ():
    red, blue = ("red", "circle"), ("blue", "star")
    cells = [("small", "top left")] * 2 + [("large", "top left")] + [("small", "bottom right")]
    samples = [drawn(red, size, place, seed) for seed, (size, place) in enumerate(cells)]
    # One pair of four is alike among six.
    value, _ = pairs.diversity([*samples, *(drawn(blue, "small", "top left", seed) for seed in range(3))])
    assert value == pytest.approx((5 / 6 + 0) / 2)
    # A picture that shows another pair does not count.
    other = pairs.Sample(blue, samples[2].picture, samples[2].shown)
    again, _ = pairs.diversity([*samples, other, *(drawn(blue, "small", "top left", s) for s in range(3))])
    assert again == value


def test_diversity_of_an_even_choice_is_seven_eighths():
    rng = np.random.default_rng(0)
    counts = Counter()
    values = []
    for _ in range(400):
        cells = rng.integers(8, size=12).tolist()
        counts.update(cells)
        values.append(pairs._simpson(cells))
    assert len(counts) == len(SIZES) * len(PLACES)
    assert np.mean(values) == pytest.approx(1 - 1 / 8, abs=4 * np.std(values) / 20)


def test_diversity_of_too_few_right_pictures_is_unknown():
    value, interval = pairs.diversity([drawn(("red", "circle"), "small", "top left", 0)])
    assert value is None
    assert interval == (0.0, 1.0)


def test_the_interval_of_diversity_covers_the_truth_in_about_95_percent_of_experiments(monkeypatch):
    rng, hits = np.random.default_rng(0), 0
    sample = drawn(("red", "circle"), "small", "top left", 0)
    places = [(size, place) for size in SIZES for place in PLACES]
    # A sample's picture need not be drawn: only its cell counts.
    monkeypatch.setattr(pairs.Sample, "right", {"all": True})
    monkeypatch.setattr(pairs.Sample, "cell", property(lambda s: places[s.picture]))
    for _ in range(400):
        cells = rng.integers(8, size=(3, 12))
        samples = [pairs.Sample(i, cell, sample.shown) for i, row in enumerate(cells) for cell in row]
        low, high = pairs.diversity(samples)[1]
        hits += low <= 1 - 1 / 8 <= high
    # 0.95 with four standard errors of 400 draws; the values' longer tail below costs another 2 points.
    assert 0.886 <= hits / 400 <= 0.994


def test_pairs_that_agree_by_chance_do_not_make_diversity_certain():
    cells = [("small", "top left"), ("large", "bottom right")]
    colours = [(colour, "circle") for colour in ("red", "blue", "green")]
    samples = [drawn(pair, *cell, seed) for pair in colours for seed, cell in enumerate(cells)]
    value, interval = pairs.diversity(samples)
    assert value == 1
    # Three comparisons of two.
    assert interval == Score(3, 3).interval
    assert interval[0] < 0.5


def test_a_measurement_of_nothing_says_so():
    assert str(Measurement("diversity", {}, None, (0.0, 1.0), 3)) == "unknown (0 to 1)"
    assert str(Measurement.of_score("accuracy", Score(1, 2))).startswith("0.5 (0.0945")


def test_captions_and_labels_of_a_pair():
    assert pairs.words(("red", "circle")) == "a red circle"
    assert len({pairs.label(pair) for pair in SEEN_PAIRS}) == len(SEEN_PAIRS)
