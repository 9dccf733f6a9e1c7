"""From one format to another, with a ledger of every tensor; and what is in a file."""
