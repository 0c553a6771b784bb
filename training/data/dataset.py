"""Triplets as the rows that training works on, tokenised once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .collator import TripletCollator
from .triplets import Triplet, check_scale


Row = dict[str, Any]
"""What `TripletCollator.encode` makes of a triplet, with its `index` and `adapter`."""


@dataclass(frozen=True)
class EncodedTriplets(Sequence[Triplet]):
    """Triplets that have been tokenised already: `encode_dataset` takes them as they are."""

    triplets: Sequence[Triplet]  # the triplets, whose items these are
    rows: Sequence[Row]  # what `collator.encode` made of each
    # it. Others that edit the same positions by the same tokenizer take the rows too, at their own alpha
    collator: TripletCollator

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, place: Any) -> Any:
        return self.triplets[place]

    def rows_for(self, collator: TripletCollator, name: str) -> Iterator[Row]:
        """What a collator's own `encode` would make of each triplet; errors call the data set `name`."""
        ours = self.collator
        same = collator.processing_class is ours.processing_class and collator.positions == ours.positions
        for i, (triplet, row) in enumerate(zip(self.triplets, self.rows, strict=True)):
            where = f"{name}[{i}]"
            if same:
                yield row | {"alpha": collator.strength(triplet, where, row["neutral"])}
            else:
                yield collator.encode(triplet, where)


def encode_dataset(collator: TripletCollator, dataset: Any, name: str, adapter: int = 0) -> list[Row]:
    """Tokenise every triplet once, so that a bad one shows before any long work starts.

    Errors call the data set `name`; `adapter` is the place of the one that the triplets belong to.

    Raises:
        ValueError: the data set is empty, a triplet can't be used, or its scores, which weigh it, are given as 0-1.
    """
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: there are no triplets to work on.")
    if isinstance(dataset, EncodedTriplets):
        rows = dataset.rows_for(collator, name)
    else:
        rows = (collator.encode(triplet, f"{name}[{i}]") for i, triplet in enumerate(dataset))
    encoded = [{**row, "adapter": adapter, "where": f"{name}[{i}]"} for i, row in enumerate(rows)]
    if collator.alpha == "trait_score":
        check_scale(dataset, name)
    return encoded


def encode_datasets(collators: Mapping[str, TripletCollator], datasets: Any, name: str) -> list[Row]:
    """Tokenise the triplets of all adapters: {adapter: triplets}, or those of the only one; each by its collator.

    Raises:
        ValueError: as `encode_dataset`, or the adapters are others than those of `collators`.
    """
    if not isinstance(datasets, Mapping):
        if len(collators) > 1:
            raise ValueError(
                f"{name} must be {{adapter: triplets}} for {', '.join(collators)}, got {type(datasets).__name__}."
            )
        (only,) = collators.values()
        return encode_dataset(only, datasets, name)
    if set(datasets) != set(collators):
        raise ValueError(
            f"{name} must hold triplets for each adapter that is trained ({', '.join(collators)}), got them for "
            f"{', '.join(map(str, datasets)) or 'none'}."
        )
    return [
        row
        for i, (adapter, collator) in enumerate(collators.items())
        for row in encode_dataset(collator, datasets[adapter], f"{name}[{adapter!r}]", i)
    ]
