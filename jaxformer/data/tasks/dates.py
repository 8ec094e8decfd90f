"""Dates in many written forms, to be translated to ISO 8601."""

import datetime
import functools

import numpy as np

from jaxformer.data import shuffle
from jaxformer.data.shuffle import Index
from jaxformer.data.tasks.task import PairTask, Side, integers

MONTHS = (
  'January',
  'February',
  'March',
  'April',
  'May',
  'June',
  'July',
  'August',
  'September',
  'October',
  'November',
  'December',
)
DAYS = ('Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday', 'Sunday')
FORMS = (
  '{year}/{month:02}/{day:02}',
  '{day} {name} {year}',
  '{name} {day}, {year}',
  '{day} {short} {year}',
  '{short} {day}, {year}',
  '{day:02}.{month:02}.{year}',
  '{name} {ordinal}, {year}',
  'the {ordinal} of {name}, {year}',
  '{weekday}, {day} {name} {year}',
  '{weekday}, {name} {ordinal}, {year}',
)
HELD_OUT = 10  # one day in 10 is for testing


class Dates(PairTask):
  """`Tuesday, March 5th, 1996` to `1996-03-05`: many forms, whose parts are in different order, to
  one.

  A pair is a random day from the first of `first_year` to the last of `last_year` in one of the
  first `forms` of ten forms, at random; the first are the plainest. One day in ten is for testing:
  a tested day was never trained on in any form. The longest source is 31 characters."""

  first_year: int = 1900
  last_year: int = 2099
  forms: int = len(FORMS)

  def validate(self) -> None:
    self.require(1000 <= self.first_year <= 9999, 'first_year', '1000 to 9999')
    self.require(self.first_year <= self.last_year <= 9999, 'last_year', 'first_year to 9999')
    self.require(1 <= self.forms <= len(FORMS), 'forms', f'1 to {len(FORMS)}')
    super().validate()

  @property
  def positions(self) -> int:
    return len('1996-03-05') + 1

  @property
  def source_positions(self) -> int:
    return 32

  def texts(self, side: Side, index_N: Index) -> list[tuple[str, str]]:
    bits = self.random_bits(side, index_N, 2)
    days = _days(self.first_year, self.last_year, side)
    day_N, form_N = days[integers(days.size, bits[:, 0])], integers(self.forms, bits[:, 1])
    dates = [datetime.date.fromordinal(int(day)) for day in day_N]
    return [
      (written(date, int(form)), date.isoformat()) for date, form in zip(dates, form_N, strict=True)
    ]


def written(date: datetime.date, form: int) -> str:
  """Return a date in one of the forms."""
  name = MONTHS[date.month - 1]
  suffix = (
    'th' if date.day in (11, 12, 13) else {1: 'st', 2: 'nd', 3: 'rd'}.get(date.day % 10, 'th')
  )
  return FORMS[form].format(
    year=date.year,
    month=date.month,
    day=date.day,
    name=name,
    short=name[:3],
    ordinal=f'{date.day}{suffix}',
    weekday=DAYS[date.weekday()],
  )


@functools.cache
def _days(first_year: int, last_year: int, side: Side) -> Index:
  """Return the days of a side, as proleptic Gregorian ordinals. A day has the same side in every
  range of years."""
  first, last = (
    datetime.date(first_year, 1, 1).toordinal(),
    datetime.date(last_year, 12, 31).toordinal(),
  )
  days = np.arange(first, last + 1)
  return days[
    (shuffle.random_below(HELD_OUT, days, shuffle.key(0, 'Dates')) == 0) == (side == 'test')
  ]
