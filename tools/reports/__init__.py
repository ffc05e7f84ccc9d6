"""What reports are made of: HTML pages, Markdown, plots, the paper's tables, files written."""
