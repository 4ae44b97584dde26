"""What was sent to a target, compared with what the source model saw.

So a failed transfer is told from another prompt being sent.

A certificate holds, for one prompt on one target:

``verbatim``        the target's template left the user content as it is (False: it removed white
                    space around it)
``same_ids``        the target's tokens of the content equal the source's. None where the source's
                    are not known, where they differ and so do the vocabularies, or where a tool
                    kept the whole prompt's ids and those differ (its template and vocabulary are
                    not known). False also where the ids that were scored are not those of the text
``same_vocabulary``, ``same_template``   None where the source's are not known
``content_tokens``, ``prompt_tokens``    of the target's rendering; ``source_content_tokens`` of the
                                         source's
``prompt_hash``, ``template_hash``, ``system_prompt_hash``  of the text sent, the target's chat
                                                            template, the system prompt

``sent_as_meant`` sums it up: False where something is known to differ that belongs to the prompt
itself (content or tokens). Another template is the target's own and no fault: chat models are
transferred to with theirs.
"""

from __future__ import annotations

from core.prompt import Conversation, Renderer
from core.records import AttackArtifact, content_hash
from core.rows import Row


def certificate(renderer: Renderer, artifact: AttackArtifact) -> Row:
    """The certificate of one artifact on the renderer's model."""
    prompt = renderer.render(
        Conversation(artifact.prompt, system=artifact.system_prompt), allow_trim=True
    )
    content = list(prompt.ids[prompt.content.start : prompt.content.stop])
    source = artifact.rendering or {}
    vocabulary, template = source.get("vocabulary"), source.get("template")
    same_vocabulary = None if vocabulary is None else vocabulary == renderer.vocabulary_hash
    same_ids: bool | None = None
    if artifact.token_fidelity is False:  # the ids that were scored are not those of the text
        same_ids = False
    elif "content_ids" in source:
        same_ids = source["content_ids"] == content
        if same_vocabulary is False and not same_ids:
            same_ids = None  # other ids are what another vocabulary is expected to give
    elif (
        "prompt_ids" in source
    ):  # of a template and vocabulary that are not known: only equality says something
        same_ids = source["prompt_ids"] == list(prompt.ids) or None
    verbatim = not prompt.trimmed
    return {
        "sent_as_meant": verbatim and same_ids is not False,
        "verbatim": verbatim,
        "same_ids": same_ids,
        "same_vocabulary": same_vocabulary,
        "same_template": None if template is None else template == renderer.template_hash,
        "content_tokens": len(content),
        "source_content_tokens": len(source["content_ids"]) if "content_ids" in source else None,
        "prompt_tokens": len(prompt.ids),
        "prompt_hash": content_hash(prompt.text),
        "template_hash": renderer.template_hash,
        "system_prompt_hash": content_hash(artifact.system_prompt)
        if artifact.system_prompt
        else None,
    }
