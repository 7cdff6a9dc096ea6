"""Move experts between ranks while the server runs: see docs/exchange.md."""
