"""The fixed prompts that codecs are judged by: prose, a table, code and a list, of several lengths.

A verdict holds a digest of them: other prompts make it outdated.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice

# What is compared of each answer. 12 prompts give 288 tokens, more than `GateLimits` asks for.
ANSWER_TOKENS = 24
_PROMPTS = 12

_PARTS = (
    "The ferry left at six in the morning, while the harbour was still dark. Ada had bought her "
    "ticket the evening before and stood at the rail with a paper cup of tea. The island lay two "
    "hours to the north: one village, one shop, a lighthouse that nobody had lived in for forty "
    "years. She was going there to repair the clock in its tower, which had stopped at ten past "
    "four on a winter night and had shown that time ever since. In her bag were oil, a set of "
    "brass wheels, and a letter from the man who had wound it last.",
    "Water that falls on a slope takes the steepest way down. Where the ground is hard it gathers "
    "into streams, and streams into rivers; where the ground is loose it sinks until it meets a "
    "layer that holds it, and flows there in the dark. A well that is dug down to such a layer "
    "fills by itself. In dry years the layer falls, and the well must be dug deeper. Villages "
    "that share one layer share its fate, although their wells may lie far from each other.",
    "Stock at the end of the month:\n"
    "| item | on the shelf | on order | price |\n|---|---|---|---|\n"
    "| nails, 40 mm | 1200 | 0 | 0.02 |\n| nails, 60 mm | 300 | 500 | 0.03 |\n"
    "| hinges, brass | 46 | 20 | 2.80 |\n| hinges, steel | 112 | 0 | 1.10 |\n"
    "| paint, white, 5 l | 9 | 12 | 31.50 |\n| paint, green, 5 l | 4 | 0 | 33.00 |\n"
    "| brushes, wide | 27 | 10 | 4.25 |\nWhat falls below ten is ordered on Monday.",
    "def shortest(graph, start):\n"
    "    distance = {start: 0}\n    queue = [(0, start)]\n    while queue:\n"
    "        so_far, node = heappop(queue)\n        if so_far > distance[node]:\n"
    "            continue\n        for neighbour, length in graph[node].items():\n"
    "            reached = so_far + length\n"
    "            if reached < distance.get(neighbour, inf):\n"
    "                distance[neighbour] = reached\n"
    "                heappush(queue, (reached, neighbour))\n    return distance\n\n"
    "A graph is a dictionary of dictionaries: for each node the lengths of the edges from it.",
    "To bake the bread, take 500 g of flour, 350 g of water, 10 g of salt and 100 g of a starter "
    "that was fed the evening before. First, mix flour and water and let them rest for half an "
    "hour. Second, add the starter and the salt, and fold the dough four times, with half an hour "
    "between. Third, let it rise until it has grown by half. Fourth, shape it, put it into a "
    "basket, and leave it in the cold overnight. Fifth, heat the oven with the pot inside, turn "
    "the loaf into the pot, and bake it for 45 minutes, the last 20 without the lid.",
    "The council met on the third of May. Present were eleven of its thirteen members. The first "
    "question was the bridge: the engineer reported that two of its five piers were worn, that a "
    "repair would take nine months, and that a new bridge would cost four times as much and last "
    "three times as long. Mrs Okafor asked who would pay. The treasurer answered that the fund "
    "held a third of the sum. After an hour it was decided, by seven votes to four, to repair the "
    "piers and to put the rest aside. The second question was postponed.",
)
_ENDS = ("In short,", "The next day,", "To sum up the above in one sentence:")


def texts() -> list[str]:
    """The prompts, of two to five parts each, so that none is a prefix of another."""
    return list(islice(_combined(), _PROMPTS))


def digest() -> str:
    """Names these prompts and how much of each answer is compared."""
    content = "\0".join([*texts(), str(ANSWER_TOKENS)])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _combined() -> Iterator[str]:
    for number in range(_PROMPTS):
        first, count = number % len(_PARTS), 2 + number % 4
        parts = [_PARTS[(first + at) % len(_PARTS)] for at in range(count)]
        # Another beginning for the second round of the same parts.
        yield "\n\n".join([f"Page {number + 1}.", *parts, _ENDS[number % len(_ENDS)]])
