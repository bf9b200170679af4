"""A domain's memory, wherever it lives: frames by pfn, page tables, the p2m."""
