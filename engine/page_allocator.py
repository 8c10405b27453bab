"""Which pages of the paged KV cache are free. Pure bookkeeping, no tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class PageAllocator:
    """Invariant: free pages + pages handed out = num_pages, each page on one side only."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = deque(range(num_pages))
        self._used: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage_ratio(self) -> float:
        return len(self._used) / self.num_pages

    def can_allocate(self, num_pages: int) -> bool:
        return num_pages <= len(self._free)

    def allocate(self, num_pages: int) -> list[int]:
        """Raises ValueError where can_allocate is false: the scheduler has to ask first."""
        if not self.can_allocate(num_pages):
            raise ValueError(f"{num_pages} pages asked for, {len(self._free)} of {self.num_pages} are free")
        pages = [self._free.popleft() for _ in range(num_pages)]
        self._used.update(pages)
        return pages

    def free(self, pages: Iterable[int]) -> None:
        """Raises ValueError for a page that is free already: somebody else may hold it by now."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} is freed twice")
            self._used.remove(page)
            self._free.append(page)
