"""One self-contained HTML page about a run: what it learnt, what it cost, and what its perception mask picked.

Reads the files that `runlog` writes: no model, no network. `records` reads them, `charts` draws, `panels` says which
curves there are, `samples` shows answers token by token, `page` puts all together. `pictures` rebuilds the pictures
of a run from its data files, where they are wanted.
"""

from megatron_cppo.report.page import write_report
from megatron_cppo.report.panels import Series
from megatron_cppo.report.pictures import rebuild_images

__all__ = ["Series", "rebuild_images", "write_report"]
