"""Reading runs back: statistics, tables and figures."""
