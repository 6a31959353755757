"""File formats: plain text and tables, XML markup, archives."""
