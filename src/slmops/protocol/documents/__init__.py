"""The YAML documents that people write: Recipe, DeviceProfile, Blueprint. Devices never import this package.

``load_documents(text, source)`` reads and validates; every error names file, line, column and what was
expected.
"""

from slmops.protocol.documents.blueprint import Blueprint
from slmops.protocol.documents.profile import Profile
from slmops.protocol.documents.reader import json_schema, load_documents, load_one
from slmops.protocol.documents.recipe import Recipe

__all__ = ["Blueprint", "Profile", "Recipe", "json_schema", "load_documents", "load_one"]
