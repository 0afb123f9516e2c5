"""One module for each code that diffnl plugs into: its signature, dtypes, order and signs, our list.

Nothing is imported here, and no module imports the other code before it is used: `docs/integrations.md` has a
recipe for each.
"""
