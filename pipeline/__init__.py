"""What decides and records: parameters, tables, workers, tracking, the flow and the command line."""
