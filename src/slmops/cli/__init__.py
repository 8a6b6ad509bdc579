"""The command line: ``slmops NOUN VERB``. Each verb parses its arguments into an ``Options`` value and runs it."""
