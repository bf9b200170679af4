"""When a live save stops its domain: the policy, as a function of nothing but numbers."""

from __future__ import annotations

from dataclasses import dataclass

from xenpv.errors import RequestError
from xenpv.frames import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Precopy:
    """How memory is sent while the guest still runs. What is left unsaid is as in libxenguest.

    ``max_iterations``: after so many passes the domain is stopped, whatever it has written; ``target_dirty``: with
    fewer dirty pages than that it is stopped; ``max_downtime``: so it is when what is dirty would be sent in so many
    seconds; ``bandwidth``: bytes a second while it runs (once it stands still nothing is held back).
    RequestError for what cannot be. xen.git:tools/libs/guest/xg_sr_save.c simple_precopy_policy().
    """

    max_iterations: int = 5
    target_dirty: int = 50
    max_downtime: float | None = None
    bandwidth: int | None = None

    def __post_init__(self) -> None:
        if self.max_iterations < 1:
            raise RequestError(f"a live save takes one pass at least, not {self.max_iterations}")
        if self.target_dirty < 0:
            raise RequestError(f"a number of dirty pages cannot be {self.target_dirty}")
        if self.max_downtime is not None and not self.max_downtime > 0:
            raise RequestError(f"a downtime of {self.max_downtime:g} s cannot be had")
        if self.bandwidth is not None and self.bandwidth < PAGE_SIZE:
            raise RequestError(f"{self.bandwidth} bytes a second: less than a page", needed=PAGE_SIZE)

    def goes_on(self, iteration: int, sent: int, dirty: int, rate: float) -> bool:
        """Whether another pass is worth it, after ``iteration`` of them: else stop the domain and send the rest.

        ``sent``: pages sent so far; ``dirty``: pages written since they were; ``rate``: bytes a second, 0 for unknown.
        """
        if iteration >= self.max_iterations or dirty < self.target_dirty:
            return False
        if iteration * dirty >= sent:  # the guest writes as much as a pass sends: nothing is gained by one more
            return False
        return self.max_downtime is None or not rate or dirty * PAGE_SIZE > self.max_downtime * rate
