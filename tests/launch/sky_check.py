"""Run by the Python that has SkyPilot: prints, for each task file, why SkyPilot does not accept it,
or ''.

SkyPilot leaves the fields of `job_recovery` open, for strategies of others; here the known ones are
all."""

import json
import sys

import jsonschema
import sky
import yaml
from sky.utils import schemas

closed = schemas.get_resources_schema()
(recovery,) = [s for s in closed['properties']['job_recovery']['anyOf'] if s['type'] == 'object']
recovery['additionalProperties'] = False


def refused(file):
  with open(file) as f:
    task = yaml.safe_load(f)
  try:
    jsonschema.validate(task, schemas.get_task_schema())
    # Of several branches the error of the best fit says which field it is.
    errors = list(jsonschema.Draft7Validator(closed).iter_errors(task['resources']))
    if errors:
      return jsonschema.exceptions.best_match(errors).message
    sky.Task.from_yaml(file)
  except Exception as e:
    return f'{type(e).__name__}: {e}'
  return ''


print(json.dumps({file: refused(file) for file in sys.argv[1:]}))
