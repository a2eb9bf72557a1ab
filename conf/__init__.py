"""The Hydra tree. Importing it registers the schemas that the YAML files are checked against."""

from dinoct.config import register

register()
