"""One self-contained HTML page about a run: what it learnt, what it cost, and what its perception mask picked.

Reads the files that `runlog` writes, and nothing else: no model, no tokenizer, no network. `records` reads them,
`charts` draws, `panels` says which curves there are, `samples` shows answers token by token, `page` puts all together.
"""

from megatron_cppo.report.page import write_report
from megatron_cppo.report.panels import Series

__all__ = ["Series", "write_report"]
