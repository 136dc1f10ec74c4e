import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kv.pages import Plane, copy_pages, planes

BLOCKS, CHUNKS = 9, 7


def engine(layers: int, page: int, gap: int = 0) -> list[torch.Tensor]:
    """Layers of one allocation, `gap` bytes apart."""
    size = BLOCKS * page + gap
    storage = torch.randint(-128, 127, (layers * size,), dtype=torch.int8)
    return [
        storage[at * size : at * size + BLOCKS * page].view(BLOCKS, page) for at in range(layers)
    ]


def host(layers: int, page: int, padding: int = 0) -> list[torch.Tensor]:
    """The host tier's views: a row a chunk, its layers side by side."""
    row = layers * page + padding
    storage = torch.zeros(CHUNKS * row, dtype=torch.int8)
    return [storage.as_strided((CHUNKS, page), (row, 1), at * page) for at in range(layers)]


@given(
    st.integers(1, 4),
    st.sampled_from([8, 24, 12, 7]),
    st.sampled_from([0, 16, 3]),
    st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(0, CHUNKS - 1)), max_size=7),
)
def test_every_byte_goes_where_it_belongs_and_back(
    layers: int, page: int, gap: int, pairs: list[tuple[int, int]]
) -> None:
    """Page sizes and distances that are no multiple of a word too; nothing else is touched."""
    blocks = list({block: None for block, _ in pairs})
    chunks = list({chunk: None for _, chunk in pairs})
    count = min(len(blocks), len(chunks))
    blocks, chunks = blocks[:count], chunks[:count]
    device, rows = engine(layers, page, gap), host(layers, page, padding=gap)
    before = [tensor.clone() for tensor in device]
    parts: list[tuple[Plane, list[int], list[int]]]
    parts = [(plane, blocks, chunks) for plane in planes(device, rows)]
    assert copy_pages(parts, to_host=True) == count * layers * page
    for layer in range(layers):
        expected = torch.zeros(CHUNKS, page, dtype=torch.int8)
        for block, chunk in zip(blocks, chunks, strict=True):
            expected[chunk] = before[layer][block]
        assert torch.equal(rows[layer], expected)
        device[layer].zero_()
    copy_pages(parts, to_host=False)
    for layer in range(layers):
        for block in range(BLOCKS):
            kept = before[layer][block] if block in blocks else torch.zeros(page, dtype=torch.int8)
            assert torch.equal(device[layer][block], kept)


@pytest.mark.parametrize(("layers", "expected"), [(1, 1), (5, 1)])
def test_evenly_spaced_layers_make_one_view(layers: int, expected: int) -> None:
    """So that a copy is one piece of work a block, however many layers there are."""
    assert len(planes(engine(layers, 16), host(layers, 16))) == expected


def test_layers_of_other_allocations_or_sizes_stay_apart() -> None:
    """Views never reach over what does not belong together."""
    mixed = engine(2, 16) + engine(1, 16) + engine(1, 32)
    row = 3 * 16 + 32
    storage = torch.zeros(CHUNKS * row, dtype=torch.int8)
    sizes, at, rows = [16, 16, 16, 32], 0, []
    for size in sizes:
        rows.append(storage.as_strided((CHUNKS, size), (row, 1), at))
        at += size
    made = planes(mixed, rows)
    assert sum(plane.page_bytes for plane in made) == row
    assert len(made) >= 2
    copy_pages([(plane, [3], [2]) for plane in made], to_host=True)
    assert all(torch.equal(rows[n][2], mixed[n][3]) for n in range(4))
