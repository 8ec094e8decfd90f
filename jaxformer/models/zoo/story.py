"""The story of the field, one step per family: what it computes, and what it changed.

Every family tells its step in its own file; `docs/story.md` and `jaxformer list` follow."""

import dataclasses
import enum

from jaxformer.config import Registry


class Chapter(enum.Enum):
  """The chapters, in their order: title and what the chapter is about."""

  RECURRENCE = (
    'Recurrence and attention',
    'A recurrent network reads a sequence into one vector; attention lets it look back.',
  )
  TRANSFORMERS = (
    'Transformers',
    'Attention alone: parallel over time in training, with a cache of all keys and values in '
    'decoding.',
  )
  STATE_SPACES = (
    'State-space models',
    'A linear recurrence, computed as a convolution or a scan: memory over long ranges in a state '
    'of constant size.',
  )
  RWKV = ('RWKV', 'A recurrent network that trains like a transformer.')
  EXPERTS = (
    'Mixtures of experts',
    'Many feed-forward layers, of which each token uses a few: more parameters at the same cost.',
  )
  LINEAR_ATTENTION = (
    'Linear attention',
    'Without the softmax, attention is a recurrence whose state is a matrix of keys and values; '
    'gates let it forget.',
  )
  DELTA_RULE = (
    'The delta rule',
    'A matrix memory that overwrites: what a key held is removed before the new value is written.',
  )
  GATED = (
    'Gated recurrences return',
    'The gates of the LSTM, on memories that are matrices or that a scan computes in parallel.',
  )
  LATENT = (
    'Latent attention',
    'Attention whose cache is a small latent vector per token, from which all heads read.',
  )
  HYBRIDS = (
    'Hybrids',
    'Recurrent layers with a few layers of attention: most of the recall at a fraction of the '
    'cache.',
  )

  @property
  def title(self) -> str:
    return self.value[0]

  @property
  def about(self) -> str:
    return self.value[1]


CHAPTERS = tuple(Chapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One step of the story.

  Attributes:
    family: of the presets that take the step.
    chapter: where it stands.
    year: of the first publication.
    formula: what is new, in one line, in the notation of `layers/layer.py`.
    change: what it changed, in one sentence.
    source: the paper, 'Authors year'.
  """

  family: str
  chapter: Chapter
  year: int
  formula: str
  change: str
  source: str

  @property
  def heading(self) -> str:
    """Number and title of the chapter, by which `jaxformer list` groups."""
    return f'{1 + CHAPTERS.index(self.chapter)}. {self.chapter.title}'


STORY: Registry[Step] = Registry('family')


def step(family: str, chapter: Chapter, year: int, formula: str, change: str, source: str) -> None:
  """Register the step of a family; the arguments are the fields of `Step`."""
  STORY.add(
    family,
    Step(family=family, chapter=chapter, year=year, formula=formula, change=change, source=source),
  )


def told() -> list[Step]:
  """Return all steps in the order of the story: by chapter, then by year."""
  steps = (STORY[name] for name in STORY)
  return sorted(steps, key=lambda s: (CHAPTERS.index(s.chapter), s.year))
