"""Write questions and answers about pictures of NLVR: texts made of the images, as LLaVA's instructions were.

    python benchmarks/nlvr_texts.py data/nlvr-mini/train.parquet outputs/nlvr_texts.parquet

The pictures are drawings of few kinds of shapes: what they show is read off their pixels. Of each are made descriptions
of its boxes, numbers of things, and statements of the kind that people wrote, with whether they are true; what those
people wrote and answered is not looked at. A statement that can be read in two ways of which one is true ("a box with
two circles" of a box with three) is not made; "only two" and numbers of colours are meant exactly, as people mean them.
"""

import argparse
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from datasets import Image as ImageFeature
from numpy.random import Generator
from PIL import Image
from scipy import ndimage

SIZE, BOX_SIDE, BOX_LEFTS = (400, 100), 100, (0, 150, 300)  # pixels
COLORS = {"black": (0, 0, 0), "yellow": (255, 255, 0), "blue": (0, 153, 255)}
SHAPES = {"square": (0.9, 1.0), "circle": (0.65, 0.85), "triangle": (0.45, 0.6)}  # filled shares of bounding boxes
SIZES = {"small": (9, 10), "medium": (19, 20), "big": (29, 30)}  # sides of bounding boxes
SOFT = 80  # a softened edge still counts as painted
TOWER_LEFT = 40  # pixels from the left wall to every tower
EACH = 4  # pictures that a statement is true of, and as many that it is false of
LOOKED_AT = 200  # pictures among which they are looked for
ROWS = 2  # of statements, of each picture: a text is encoded with its picture, and should not be long
MOST_UNSUCCESSFUL = 1000  # statements in a row for which none are found
MOST_NUMBERS = 8  # different "how many", of towers: three colours or any, blocks or items


class Item(NamedTuple):
    """A shape, and its bounding box in pixels of its grey box: x to the right, y down; right and bottom not in it."""

    color: str
    shape: str
    size: str
    left: int
    top: int
    right: int
    bottom: int


Box = list[Item]
Truth = bool | None  # None: it depends on how the words are read
Rule = Callable[[int], Truth]  # of a number
Property = tuple[str, Callable[[Box], Truth]]  # words for what a box has, and whether it has it
Statement = tuple[str, Callable[[list[Box]], Truth]]


# Pictures


def read_boxes(picture: Image.Image) -> list[Box]:
    """What the three boxes of a picture hold, each from its top to its bottom.

    Raises:
        ValueError: another size; something black, yellow or blue that is none of the shapes, as two that touch.
    """
    if picture.size != SIZE:
        raise ValueError(f"a picture of {picture.size} pixels; NLVR's have {SIZE}")
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    boxes = []
    for start in BOX_LEFTS:
        box = []
        for color, rgb in COLORS.items():
            parts, _ = ndimage.label(np.abs(pixels[:, start : start + BOX_SIDE] - rgb).max(-1) < SOFT)
            for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
                filled, width = (parts[rows, columns] == number).mean(), columns.stop - columns.start
                shape = name_of(filled, SHAPES, "share that is filled")
                top = rows.start - (shape == "triangle")  # whose tip is thinner than a pixel
                if rows.stop - top != width:
                    raise ValueError(
                        f"something {color} is {width} pixels wide and {rows.stop - top} high; NLVR's"
                        " shapes are as high as they are wide"
                    )
                size = name_of(width, SIZES, "width")
                box.append(Item(color, shape, size, columns.start, top, columns.stop, rows.stop))
        boxes.append(sorted(box, key=lambda item: (item.top, item.left)))
    return boxes


def name_of(value: float, ranges: dict[str, tuple[float, float]], what: str) -> str:
    """The name whose range holds the value; a ValueError if none does."""
    for name, (low, high) in ranges.items():
        if low <= value <= high:
            return name
    raise ValueError(f"something painted has a {what} of {value:.3g}, which is in none of {ranges}")


def are_towers(boxes: list[Box]) -> bool:
    """Whether squares stand upon each other; else shapes are scattered."""
    return all(item.shape == "square" and item.left == TOWER_LEFT for box in boxes for item in box)


def touching(item: Item) -> dict[str, Truth]:
    """Of each wall of its box whether an item touches it; of one that is a pixel away, people say both."""
    gaps = {"left": item.left, "top": item.top, "right": BOX_SIDE - item.right, "bottom": BOX_SIDE - item.bottom}
    return {wall: True if gap <= 0 else None if gap == 1 else False for wall, gap in gaps.items()}


# Truths


def any_of(truths: Iterable[Truth]) -> Truth:
    """True if one is; else None if one is; else False."""
    truths = list(truths)
    return True if True in truths else None if None in truths else False


def opposite(truth: Truth) -> Truth:
    return None if truth is None else not truth


def all_of(truths: Iterable[Truth]) -> Truth:
    return opposite(any_of(map(opposite, truths)))


def of_number(rule: Rule, truths: Iterable[Truth]) -> Truth:
    """The rule, of how many truths are True; None if that depends on those that are None."""
    truths = list(truths)
    least = truths.count(True)
    judged = {rule(count) for count in range(least, least + truths.count(None) + 1)}
    return judged.pop() if len(judged) == 1 else None


# Parts of statements. What is drawn never depends on a picture, so that one statement can be judged of many


class Kind(NamedTuple):
    """Items of a kind: its name, in the singular and plural, and which items are meant."""

    singular: str
    plural: str
    holds: Callable[[Item], Truth]

    def judge(self, rule: Rule, items: Iterable[Item]) -> Truth:
        """The rule, of how many of the items are meant."""
        return of_number(rule, map(self.holds, items))


def choose(rng: Generator, *words: str) -> str:
    return words[rng.integers(len(words))]


def draw_color(rng: Generator) -> str:
    return choose(rng, *COLORS)


def draw_colors(rng: Generator) -> list[str]:
    """Two different ones."""
    return [str(color) for color in rng.choice(list(COLORS), 2, replace=False)]


def draw_things(rng: Generator, towers: bool) -> str:
    return "blocks" if towers else choose(rng, "items", "objects")


def draw_kind(rng: Generator, towers: bool, color: str | None = None, placed: bool = True) -> Kind:
    """A kind of a colour or any, and, unless towers are spoken of, of a shape, a size and, if `placed`, a place."""
    color = color or (draw_color(rng) if rng.random() < (0.95 if towers else 0.7) else None)
    shape = choose(rng, *SHAPES) if not towers and rng.random() < 0.6 else None
    size = choose(rng, *SIZES) if not towers and rng.random() < 0.1 else None
    noun = shape or (choose(rng, "block", "block", "block", "item") if towers else choose(rng, "item", "object"))
    before = "".join(f"{word} " for word in (size, color) if word)
    place, stands = draw_place(rng) if placed and not towers and rng.random() < 0.3 else ("", lambda item: True)
    wanted = (color, shape, size)

    def holds(item: Item) -> Truth:
        return stands(item) if all(word in (None, value) for word, value in zip(wanted, item, strict=False)) else False

    return Kind(f"{before}{noun}{place}", f"{before}{noun}s{place}", holds)


def draw_place(rng: Generator) -> tuple[str, Callable[[Item], Truth]]:
    """Words behind a kind, and which items stand there."""
    wall, where = choose(rng, "wall", "edge", "side"), rng.integers(7)
    at = f" {choose(rng, 'closely ', '', '')}touching"
    if where == 0:
        words = f" not touching {choose(rng, 'any', 'the')} {wall}"
        return words, lambda item: opposite(any_of(touching(item).values()))
    if where == 1:
        return f"{at} the {choose(rng, 'base', 'bottom', 'bottom edge')}", lambda item: touching(item)["bottom"]
    if where == 2:
        return f"{at} the top", lambda item: touching(item)["top"]
    if where == 3:
        words = f"{at} {choose(rng, 'a', 'the')} corner"
        return words, lambda item: of_number(lambda count: count > 1, touching(item).values())
    if where == 4:
        side = choose(rng, "left", "right")
        return f"{at} the {side} {wall}", lambda item: touching(item)[side]
    return f"{at} {choose(rng, 'the', 'the', 'a')} {wall}", lambda item: any_of(touching(item).values())


def write_number(rng: Generator, number: int) -> str:
    return choose(rng, str(number), ("one", "two", "three", "four", "five", "six")[number - 1])


def draw_amount(
    rng: Generator,
    singular: str,
    plural: str,
    most: int,
    hows: tuple[str, ...] = ("exactly", "only", "at least", "at most", "no", "", "", "", "a", "a"),
    least: int = 1,
) -> tuple[str, Rule]:
    """So many of something, with one of `hows` before it: words, and the rule for how many there are."""
    number, how = int(rng.integers(least, most + 1)), choose(rng, *hows)
    words = f"{write_number(rng, number)} {singular if number == 1 else plural}"
    if how == "a":
        return f"{'an' if singular[0] in 'aeiou' else 'a'} {singular}", lambda count: count >= 1
    if how == "no":
        return f"no {choose(rng, singular, plural)}", lambda count: count == 0
    if how in ("exactly", "only"):
        return f"{how} {words}", lambda count: count == number
    if how == "at least":
        return f"{how} {words}", lambda count: count >= number
    if how == "at most":
        return f"{how} {words}", lambda count: count <= number if count else None  # of none, nobody says so
    return words, lambda count: None if count > number else count == number


def there(words: str, plural: str) -> str:
    return f"There {'are' if plural in words else 'is'} {words}"


# Statements about boxes: which boxes, and what they have


def draw_boxes(rng: Generator, towers: bool) -> tuple[str, Callable[[list[Truth]], Truth]]:
    """Words with a gap, into which what boxes have is put, and the rule for the truths of the three.

    "Two towers which has" is how people wrote it.
    """
    box = choose(rng, "tower", "tower", "tower", "box") if towers else choose(rng, "box", "box", "box", "grey square")
    boxes = "boxes" if box == "box" else f"{box}s"
    having, how = choose(rng, "with", "with", "with", "having", "which has", "that has"), rng.random()
    if how < 0.45:
        return f"There is a {box} {having} {{}}", any_of
    if how < 0.75:
        words, rule = draw_amount(rng, box, boxes, 3)
        return f"{there(words, boxes)} {having} {{}}", lambda truths: of_number(rule, truths)
    if how < 0.85:
        number = int(rng.integers(1, 3))
        lead = (
            f"{('One', 'Two')[number - 1]} of the {choose(rng, '', 'three ')}{boxes} {choose(rng, 'has', 'contains')}"
        )
        return f"{lead} {{}}", lambda truths: of_number(lambda n: None if n > number else n == number, truths)
    if how < 0.95:
        return f"{choose(rng, 'Each', 'Every')} {box} has {{}}", all_of
    return f"None of the {boxes} has {{}}", lambda truths: opposite(any_of(truths))


def has_amount(rng: Generator, towers: bool) -> Property:
    kind = draw_kind(rng, towers)
    words, rule = draw_amount(rng, kind.singular, kind.plural, 4)
    return words, lambda box: kind.judge(rule, box)


def has_pair(rng: Generator, towers: bool) -> Property:
    kinds = [draw_kind(rng, towers, color, placed=False) for color in draw_colors(rng)]
    # Nothing that might be meant of both: "only two black items and a blue one".
    amounts = [draw_amount(rng, kind.singular, kind.plural, 3, ("", "a")) for kind in kinds]
    words = " and ".join(words for words, _ in amounts)
    return words, lambda box: all_of(kind.judge(rule, box) for kind, (_, rule) in zip(kinds, amounts, strict=True))


def has_total(rng: Generator, towers: bool) -> Property:
    things = draw_things(rng, towers)
    words, rule = draw_amount(rng, things.removesuffix("s"), things, 5)
    return words, lambda box: rule(len(box))


def draw_height(rng: Generator) -> tuple[str, Rule]:
    """A number of blocks that some towers have and others have not."""
    how = choose(rng, "exactly", "only", "", "at least")
    return draw_amount(rng, "block", "blocks", 4, (how,), least=2 if how == "at least" else 1)


def has_only(rng: Generator, towers: bool) -> Property:
    colors = draw_colors(rng)[: rng.integers(1, 3)]

    def only(box: Box) -> Truth:
        found = {item.color for item in box}
        return True if found == set(colors) else None if found and found < set(colors) else False

    return f"only {' and '.join(colors)} {draw_things(rng, towers)}", only


def has_colors(rng: Generator, towers: bool) -> Property:
    number, things = int(rng.integers(1, 4)), draw_things(rng, towers)
    words = "all {} of the same color" if number == 1 else f"{{}} of {write_number(rng, number)} different colors"

    def holds(box: Box) -> Truth:
        alone = number == 1 and len(box) == 1  # is one item alone of the same colour?
        return None if alone else len({item.color for item in box}) == number

    return words.format(things), holds


def has_end(rng: Generator, towers: bool) -> Property:
    """Of towers."""
    color, (where, end) = draw_color(rng), draw_end(rng)
    words = choose(rng, f"a {color} block at the {where}", f"a {color} block at the {where}", f"a {color} {where}")
    return words, lambda box: bool(box) and box[end].color == color


def has_height_and_end(rng: Generator, towers: bool) -> Property:
    """Of towers."""
    (height, rule), (end, holds) = draw_height(rng), has_end(rng, towers)
    return f"{height} and {end}", lambda box: all_of((rule(len(box)), holds(box)))


def has_above(rng: Generator, towers: bool) -> Property:
    """Of towers."""
    upper, lower = draw_color(rng), draw_color(rng)
    words = (
        f"a {upper} block {choose(rng, 'on', 'over', 'above')} a {lower} block",
        f"a {lower} block {choose(rng, 'under', 'below')} a {upper} block",
    )

    def holds(box: Box) -> Truth:
        colors = [item.color for item in box]
        apart = any(color == upper and lower in colors[n + 1 :] for n, color in enumerate(colors))
        return (upper, lower) in zip(colors, colors[1:], strict=False) or (None if apart else False)

    return choose(rng, words[0], *words), holds


def draw_end(rng: Generator) -> tuple[str, int]:
    """A word for an end of a tower, and its index from the top."""
    return ("top", 0) if rng.random() < 0.5 else (choose(rng, "base", "bottom"), -1)


OF_ALL_BOXES = (*[has_amount] * 8, *[has_pair] * 2, has_total, has_only, has_colors)
OF_TOWERS = (has_end, has_end, has_end, has_height_and_end, has_above, has_above)


def say_of_boxes(rng: Generator, towers: bool) -> Statement:
    forms = OF_ALL_BOXES + (OF_TOWERS if towers else ())
    lead, rule = draw_boxes(rng, towers)
    words, holds = forms[rng.integers(len(forms))](rng, towers)
    return lead.format(words), lambda boxes: rule([holds(box) for box in boxes])


# Statements about a picture as a whole


def say_total(rng: Generator, towers: bool) -> Statement:
    kind = draw_kind(rng, towers)
    words, rule = draw_amount(rng, kind.singular, kind.plural, 4)
    return there(words, kind.plural), lambda boxes: kind.judge(rule, chain(*boxes))


def say_same_box(rng: Generator, towers: bool) -> Statement:
    kind, box = draw_kind(rng, towers), choose(rng, "tower", "box") if towers else choose(rng, "box", "grey square")

    def in_one(boxes: list[Box]) -> Truth:
        several = kind.judge(lambda count: count > 1, chain(*boxes))
        return of_number(lambda count: count == 1, [kind.judge(bool, b) for b in boxes]) if several else None

    return f"All {kind.plural} are in the same {box}", in_one


def say_all_shapes(rng: Generator, towers: bool) -> Statement:
    """Of scattered shapes."""
    shape, color = choose(rng, *SHAPES), draw_color(rng)

    def all_are(boxes: list[Box]) -> Truth:
        found = [item.color for box in boxes for item in box if item.shape == shape]
        return None if len(found) < 2 else set(found) == {color}

    return f"All {shape}s are {color}", all_are


def say_ends(rng: Generator, towers: bool) -> Statement:
    """Of towers: colours of their ends, which may be those of towers of a height."""
    color, (where, end) = draw_color(rng), draw_end(rng)
    words, rule = draw_amount(rng, f"{color} block", f"{color} blocks", 3)
    height, tall = draw_height(rng) if rng.random() < 0.4 else ("", lambda count: True)
    sentence = f"{there(words, 'blocks')} as the {where} of a tower{height and ' with '}{height}"

    def holds(boxes: list[Box]) -> Truth:
        return of_number(rule, [tall(len(box)) if box and box[end].color == color else False for box in boxes])

    return sentence, holds


def say_same_ends(rng: Generator, towers: bool) -> Statement:
    """Of towers."""
    (where, end), same = draw_end(rng), rng.random() < 0.5
    sentence = f"The {where} blocks of the three towers are {'' if same else 'not '}the same in color"
    return sentence, lambda boxes: (len({box[end].color for box in boxes if box}) == 1) == same


def say_above(rng: Generator, towers: bool) -> Statement:
    """Of towers."""
    words, holds = has_above(rng, towers)
    bare = words.removeprefix("a ")
    if rng.random() < 0.2:
        return f"There is no {bare}", lambda boxes: opposite(any_of(map(holds, boxes)))
    return f"There is {choose(rng, 'a', 'a', 'at least one')} {bare}", lambda boxes: any_of(map(holds, boxes))


SAID_OF_ALL = (*[say_of_boxes] * 8, say_total, say_total, say_total, say_same_box)
SAID_OF_TOWERS = (say_ends, say_ends, say_same_ends, say_above)
SAID_OF_SCATTERED = (say_all_shapes, say_total, say_total)


def draw_statement(rng: Generator, towers: bool) -> Statement:
    forms = SAID_OF_ALL + (SAID_OF_TOWERS if towers else SAID_OF_SCATTERED)
    return forms[rng.integers(len(forms))](rng, towers)


def vary(sentence: str, rng: Generator) -> str:
    """The same as people write it: with or without capital and full stop."""
    sentence = sentence if rng.random() < 0.7 else sentence[0].lower() + sentence[1:]
    return sentence + ("." if rng.random() < 0.4 else "")


def make_statements(pictures: list[list[Box]], mean_count: int, rng: Generator) -> list[dict[str, str]]:
    """Of each picture statements, with "true" or "false": `mean_count` on average, at most twice as many.

    Each is true of as many pictures as it is false of, so that nothing follows from the words of one alone. A third
    are chosen within groups of pictures that show the same things, differently arranged: most of NLVR's pictures have
    such a companion, of which what people wrote of them is false, so that counting over a whole picture helps little.
    With half of them so less is learned (docs/results/alignment.md).

    Raises:
        ValueError: so many cannot be found.
    """
    made: list[dict[str, str]] = [{} for _ in pictures]
    kinds = np.array([are_towers(boxes) for boxes in pictures])
    numbers = {towers: np.flatnonzero(kinds == towers) for towers in (True, False)}
    pools = {
        "the same things": {towers: group_by_things(pictures, own) for towers, own in numbers.items()},
        "any things": {towers: [own] for towers, own in numbers.items()},
    }
    wanted = mean_count * len(pictures)
    missing, unsuccessful = {"the same things": wanted / 3, "any things": wanted * 2 / 3}, 0
    while max(missing.values()) > 0:
        pool = max(missing, key=missing.get)
        towers = bool(kinds[rng.integers(len(pictures))])
        sentence, truth = draw_statement(rng, towers)
        groups = pools[pool][towers]
        sizes = np.array([len(group) for group in groups])
        found: dict[Truth, list[int]] = {True: [], False: []}
        looked_at = 0
        for place in rng.choice(len(groups), len(groups), replace=False, p=sizes / sizes.sum()):
            group = rng.permutation(groups[place])[: LOOKED_AT - looked_at]
            judged: dict[Truth, list[int]] = {True: [], False: [], None: []}
            for number in group:
                free = sentence not in made[number] and len(made[number]) < 2 * mean_count
                judged[truth(pictures[number]) if free else None].append(number)
            each = min(len(judged[True]), len(judged[False]), EACH - len(found[True]))
            for answer, chosen in found.items():
                chosen += judged[answer][:each]
            looked_at += len(group)
            if len(found[True]) == EACH or looked_at == LOOKED_AT:
                break
        unsuccessful = 0 if found[True] else unsuccessful + 1
        if unsuccessful > MOST_UNSUCCESSFUL:
            raise ValueError(
                f"{len(pictures)} pictures are too few for {mean_count} statements each, or too few of them show"
                f" {pool}, differently arranged"
            )
        for answer, chosen in found.items():
            for number in chosen:
                made[number][sentence] = "true" if answer else "false"
        missing[pool] -= 2 * len(found[True])
    return [{vary(sentence, rng): answer for sentence, answer in statements.items()} for statements in made]


def group_by_things(pictures: list[list[Box]], numbers: Iterable[int]) -> list[list[int]]:
    """Those of the pictures with these numbers that show the same things, by color, shape and size, together."""
    groups: dict[tuple, list[int]] = {}
    for number in numbers:
        things = sorted(item[:3] for box in pictures[number] for item in box)
        groups.setdefault(tuple(things), []).append(int(number))
    return list(groups.values())


# Descriptions and numbers


def describe(boxes: list[Box]) -> dict[str, str]:
    """What each box holds: the blocks of a tower from its top, or how many there are of each colour and shape."""
    return {
        f"What is in the {place} box?": contents(box, are_towers(boxes))
        for place, box in zip(("left", "middle", "right"), boxes, strict=True)
    }


def contents(box: Box, tower: bool) -> str:
    if tower:
        return ", ".join(f"{item.color} block" for item in box) or "nothing"
    counts = sorted(Counter((item.color, item.shape) for item in box).items())
    return ", ".join(f"{n} {color} {shape}{'s' if n > 1 else ''}" for (color, shape), n in counts) or "nothing"


def count_things(boxes: list[Box], count: int, rng: Generator) -> dict[str, str]:
    """`count` questions how many there are of something, with the numbers."""
    asked: dict[str, str] = {}
    while len(asked) < count:
        kind = draw_kind(rng, are_towers(boxes))
        held = list(map(kind.holds, chain(*boxes)))
        if None not in held:
            asked[f"How many {kind.plural} are there?"] = str(sum(held))
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="Parquet file with the column image")
    parser.add_argument("out", type=Path)
    parser.add_argument("--numbers", type=int, default=3, help=f"of each picture, at most {MOST_NUMBERS}")
    parser.add_argument("--statements", type=int, default=32, help="of each picture, on average")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 0 <= options.numbers <= MOST_NUMBERS:
        parser.error(
            f"--numbers={options.numbers} must lie in [0, {MOST_NUMBERS}]; towers have no more kinds of things"
        )
    source = load_dataset("parquet", data_files=str(options.pictures), split="train").select_columns("image")
    source = source.cast_column("image", ImageFeature(decode=False))
    encoded = list({row["image"]["bytes"]: None for row in source})  # one picture stands by several sentences
    pictures = []
    for data in encoded:
        try:
            pictures.append(read_boxes(Image.open(io.BytesIO(data))))
        except ValueError as error:
            sys.exit(f"{options.pictures}: picture {len(pictures)}: {error}")
    rng = np.random.default_rng(options.seed)
    # Rows of their own: a statement that stood behind a description would be judged by that, not by the picture.
    described = [describe(boxes) | count_things(boxes, options.numbers, rng) for boxes in pictures]
    stated = make_statements(pictures, options.statements, rng)
    parts = [[dict(list(statements.items())[n::ROWS]) for statements in stated] for n in range(ROWS)]
    table = [
        {"image": {"bytes": data, "path": None}, "question": list(asked), "answer": list(asked.values())}
        for texts in [described, *parts]
        for data, asked in zip(encoded, texts, strict=True)
        if asked
    ]
    strings = List(Value("string"))
    features = Features(image=ImageFeature(), question=strings, answer=strings)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table, features=features).to_parquet(str(options.out))
    count = sum(len(row["question"]) for row in table)
    print(f"wrote {count} questions and answers about {len(pictures)} pictures to {options.out}")


if __name__ == "__main__":
    main()
