"""Texts made of NLVR's pictures: what is read off a drawing, and what is said of it."""

import importlib.util
import subprocess
import sys
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw
from tiny_recipes import ROOT

PAINT = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}


@pytest.fixture(scope="module")
def texts():
    spec = importlib.util.spec_from_file_location("nlvr_texts", ROOT / "benchmarks" / "nlvr_texts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def draw(*items: tuple[int, str, str, int, int, int]) -> Image.Image:
    """A picture with (box, color, shape, side, left, top) drawn as NLVR's are: softened, on grey."""
    times = 4
    big = Image.new("RGB", (400 * times, 100 * times), (128, 128, 128))
    pen = ImageDraw.Draw(big)
    for start in (0, 150, 300):
        pen.rectangle((start * times, 0, (start + 100) * times - 1, 100 * times), fill=(211, 211, 211))
    for box, color, shape, side, left, top in items:
        x, y, s = (150 * box + left) * times, top * times, side * times
        area = (x, y, x + s - 1, y + s - 1)
        if shape == "square":
            pen.rectangle(area, fill=PAINT[color])
        elif shape == "circle":
            pen.ellipse(area, fill=PAINT[color])
        else:
            pen.polygon([(x, y + s - 1), (x + s // 2, y), (x + s - 1, y + s - 1)], fill=PAINT[color])
    return big.resize((400, 100), Image.Resampling.BOX)


SCATTERED = draw(
    (0, "black", "square", 20, 0, 30),
    (0, "yellow", "circle", 30, 50, 70),
    (1, "blue", "triangle", 10, 40, 40),
    (1, "blue", "triangle", 20, 60, 20),
)
TOWERS = draw(
    (0, "blue", "square", 20, 40, 80),
    (1, "black", "square", 20, 40, 59),
    (1, "yellow", "square", 20, 40, 80),
    (2, "black", "square", 20, 40, 38),
    (2, "black", "square", 20, 40, 59),
    (2, "blue", "square", 20, 40, 80),
)


def test_shapes_are_read_off_the_pixels(texts):
    left, middle, right = texts.read_boxes(SCATTERED)
    assert [item[:3] for item in left] == [("black", "square", "medium"), ("yellow", "circle", "big")]
    assert [item[:3] for item in middle] == [("blue", "triangle", "medium"), ("blue", "triangle", "small")]
    assert right == []
    touched = [{wall for wall, truth in texts.touching(item).items() if truth} for item in (*left, *middle)]
    assert touched == [{"left"}, {"bottom"}, set(), set()]


def test_towers_are_known_and_read_from_the_top(texts):
    towers, scattered = texts.read_boxes(TOWERS), texts.read_boxes(SCATTERED)
    assert texts.are_towers(towers) and not texts.are_towers(scattered)
    assert texts.describe(towers) == {
        "What is in the left box?": "blue block",
        "What is in the middle box?": "black block, yellow block",
        "What is in the right box?": "black block, black block, blue block",
    }
    assert texts.describe(scattered) == {
        "What is in the left box?": "1 black square, 1 yellow circle",
        "What is in the middle box?": "2 blue triangles",
        "What is in the right box?": "nothing",
    }


def test_of_an_item_a_pixel_from_a_wall_people_say_both(texts):
    (item,), _, _ = texts.read_boxes(draw((0, "blue", "triangle", 10, 0, 1)))
    assert texts.touching(item) == {"left": True, "top": None, "right": False, "bottom": False}


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image.new("RGB", (100, 400)), r"\(100, 400\).*\(400, 100\)"),
        (draw((0, "blue", "square", 40, 10, 10)), "width of 40"),
        (draw((0, "blue", "square", 10, 10, 10), (0, "blue", "square", 10, 10, 20)), "10 pixels wide and 20 high"),
    ],
)
def test_what_is_no_shape_is_refused(texts, picture, message):
    with pytest.raises(ValueError, match=message):
        texts.read_boxes(picture)


TRUE_OF_TOWERS = {  # of those above, written by hand; a statement that has two readings is None
    "There are two blue blocks": True,
    "There is 1 blue block": None,
    "There are exactly 3 black blocks": True,
    "There are at least 4 black blocks": False,
    "There is no yellow block": False,
    "There is a tower with only two blocks": True,
    "There is a tower with no yellow block": True,
    "There is a tower having a black block on a yellow block": True,
    "There is a yellow block on a black block": False,
    "There is no yellow block over a black block": True,
    "There is a black block over a blue block": True,
    "There is at least one blue block under a black block": True,
    "There are exactly two towers with a black block at the top": True,
    "Two of the three towers has a blue base": True,
    "One of the three towers has a blue base": None,
    "None of the towers has a yellow top": True,
    "There are two blue blocks as the base of a tower": True,
    "There is a blue block as the base of a tower with three blocks": True,
    "There is a blue block as the base of a tower with exactly two blocks": False,
    "The top blocks of the three towers are not the same in color": True,
    "The base blocks of the three towers are the same in color": False,
    "There is a tower with only blue blocks": True,
    "There is a tower with only yellow blocks": False,
    "Every tower has at least one blue block": False,
    "Each tower has a blue block": False,
    "All black blocks are in the same tower": False,
    "All yellow blocks are in the same tower": None,
}


TRUE_OF_SCATTERED = {  # a triangle a pixel from the top, a square in a corner, three colours in the right box
    "All triangles are blue": None,
    "All squares are black": True,
    "There is a square touching the corner": True,
    "There is a square closely touching the left wall": True,
    "There is a circle touching the top": False,
    "There is a triangle touching the top": None,
    "There is an object touching the top": None,
    "There is a black item touching the bottom": True,
    "There are exactly three items not touching any wall": None,
    "There are at least two items not touching any wall": True,
    "There is a box with items of two different colors": False,
    "There is a box with items of three different colors": True,
    "There is a box with a black square and a blue circle": True,
    "There is a box with 4 objects": True,
    "There is a box with 3 objects": None,
    "There is a box with exactly 3 objects": False,
    "None of the boxes has two squares": False,
    "None of the boxes has a square": False,
    "There is exactly one box with a triangle": True,
    "There are at least three circles": False,
}


@pytest.mark.parametrize("towers", [True, False])
def test_statements_are_judged_as_a_person_would(texts, towers):
    """Every sentence above is one that is drawn, and its truth is the one above."""
    scattered = draw(
        (0, "blue", "triangle", 10, 40, 1),
        (2, "black", "square", 20, 0, 80),
        (2, "black", "square", 10, 50, 40),
        (2, "blue", "circle", 30, 60, 60),
        (2, "yellow", "circle", 10, 40, 20),
    )
    boxes, rng = texts.read_boxes(TOWERS if towers else scattered), np.random.default_rng(0)
    left = dict(TRUE_OF_TOWERS if towers else TRUE_OF_SCATTERED)
    for _ in range(500_000):
        sentence, truth = texts.draw_statement(rng, towers)
        if sentence in left:
            assert truth(boxes) is left.pop(sentence), sentence
        if not left:
            break
    assert not left


def stack(rng, colors):
    """Three towers of blocks of these colors, at random."""
    boxes = np.split(rng.permutation(colors), np.sort(rng.choice(np.arange(1, len(colors)), 2, replace=False)))
    return [(box, str(c), "square", 20, 40, 80 - 21 * n) for box in range(3) for n, c in enumerate(boxes[box][:4])]


@pytest.fixture(scope="module")
def pictures(texts):
    """Towers and scattered shapes at random, two pictures of the same things after each other."""
    rng = np.random.default_rng(0)

    def scattered(colors):
        spots = [(x, y) for x in (0, 35, 69) for y in (0, 35, 69)]
        boxes, places = rng.integers(3, size=len(colors)), rng.permutation(9)
        drawn = zip(colors, list(texts.SHAPES) * 2, [10, 20, 30] * 2, strict=False)
        return [
            (int(box), str(color), shape, side, *spots[place])
            for box, place, (color, shape, side) in zip(boxes, places, drawn, strict=False)
        ]

    made = []
    for number in range(30):
        colors = rng.choice(list(PAINT), rng.integers(4, 7))
        made += [draw(*(stack(rng, colors) if number % 2 else scattered(colors))) for _ in range(2)]
    return made


def test_each_statement_is_true_as_often_as_false(texts, pictures):
    """Words alone say nothing: what a blind model could learn of them is the share of true ones, a half."""
    boxes = [texts.read_boxes(picture) for picture in pictures]
    made = texts.make_statements(boxes, 10, np.random.default_rng(1))
    assert sum(map(len, made)) >= 600
    said = [
        (sentence.lower().removesuffix("."), answer) for statements in made for sentence, answer in statements.items()
    ]
    answers = {word: Counter(sentence for sentence, answer in said if answer == word) for word in ("true", "false")}
    assert answers["true"] == answers["false"]
    again = texts.make_statements(boxes, 10, np.random.default_rng(1))
    assert made == again


def test_a_third_of_the_statements_tell_pictures_of_the_same_things_apart(texts, pictures):
    """Each true of as many pictures as it is false of within every group of pictures that show the same things."""
    boxes = [texts.read_boxes(picture) for picture in pictures]
    groups = texts.group_by_things(boxes, range(len(boxes)))
    assert sorted(chain(*groups)) == list(range(60)) and all(len(group) % 2 == 0 for group in groups)
    made = texts.make_statements(boxes, 20, np.random.default_rng(0))
    assert max(map(len, made)) <= 40
    balance = {}
    for number, group in enumerate(groups):
        for picture in group:
            for sentence, answer in made[picture].items():
                one = balance.setdefault(sentence.lower().removesuffix("."), Counter())
                one[number] += 1 if answer == "true" else -1
    told_apart = [not any(counts.values()) for counts in balance.values()]
    assert 0.25 < np.mean(told_apart) < 0.45


def test_pictures_get_alike_many_statements_wherever_they_stand(texts):
    """Of twenty arrangements of the same things no one comes first."""
    rng = np.random.default_rng(0)
    colors = ["black", "black", "yellow", "yellow", "blue", "blue"]
    boxes = [texts.read_boxes(draw(*stack(rng, colors))) for _ in range(40)]
    counts = [len(statements) for statements in texts.make_statements(boxes, 20, rng)]
    assert abs(sum(counts[:20]) / sum(counts) - 0.5) < 0.05 and min(counts) >= 10


def test_pictures_without_companions_are_refused(texts, pictures):
    boxes = [texts.read_boxes(picture) for picture in pictures]
    alone = [boxes[group[0]] for group in texts.group_by_things(boxes, range(60))]
    with pytest.raises(ValueError, match="too few of them show the same things, differently arranged"):
        texts.make_statements(alone, 10, np.random.default_rng(0))


def test_more_numbers_than_kinds_of_things_are_refused(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "nlvr_texts.py", "none.parquet", tmp_path / "texts.parquet"]
    ended = subprocess.run([*map(str, command), "--numbers", "9"], capture_output=True, text=True)
    assert ended.returncode != 0 and "--numbers=9 must lie in [0, 8]" in ended.stderr


def test_too_few_pictures_are_refused(texts, pictures):
    boxes = [texts.read_boxes(pictures[0])] * 2
    with pytest.raises(ValueError, match="2 pictures are too few"):
        texts.make_statements(boxes, 10, np.random.default_rng(0))


def test_the_file_holds_each_picture_once_with_each_sort_of_texts(pictures, tmp_path):
    source = tmp_path / "pictures.parquet"
    rows = {"image": [*pictures, pictures[0]], "sentence": ["not looked at"] * 61}
    Dataset.from_dict(rows).cast_column("image", ImageFeature()).to_parquet(str(source))
    command = [sys.executable, ROOT / "benchmarks" / "nlvr_texts.py", source, tmp_path / "texts.parquet"]
    subprocess.run([*map(str, command), "--statements", "12"], check=True, capture_output=True)
    made = load_dataset("parquet", data_files=str(tmp_path / "texts.parquet"), split="train", cache_dir=str(tmp_path))
    assert len(made) == 180
    for described, *rows in zip(*(made.select(range(n, n + 60)) for n in (0, 60, 120)), strict=True):
        stated = {name: rows[0][name] + rows[1][name] for name in ("question", "answer")}
        assert abs(len(rows[0]["question"]) - len(rows[1]["question"])) <= 1 and len({*stated["question"]}) > 1
        assert described["image"] == rows[0]["image"] == rows[1]["image"]
        assert "not looked at" not in described["question"] + stated["question"]
        assert described["question"][0] == "What is in the left box?" and len(described["answer"]) == 6
        assert all(answer.isdigit() for answer in described["answer"][3:])
        assert len(stated["question"]) == len(stated["answer"]) and {*stated["answer"]} <= {"true", "false"}
    assert sum(map(len, made["answer"][60:])) >= 12 * 60
