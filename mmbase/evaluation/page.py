"""The report's page as a Jinja template. Rendered with autoescape on: every value is escaped where it is printed."""

# No script and nothing from outside: the policy in the head lets the browser hold us to it.
PAGE = """\
{% macro meter(metrics, key, first=false) -%}
<div class="measure{{ ' first' if first }}">
  <b>{{ metrics[key] | percent }}</b><span>{{ key | metric_name }}</span>
  <div class="meter" role="img"
    aria-label="{{ metrics[key] | percent }}; chance {{ metrics[key ~ '_chance'] | percent }}">
    <i class="fill" style="width: {{ metrics[key] | share }}"></i>
    <i class="chance" style="left: {{ metrics[key ~ '_chance'] | share }}"></i>
  </div>
  <small>{% if key ~ '_ci95' in metrics %}95 % interval {{ metrics[key ~ '_ci95'][0] | percent }} to
    {{ metrics[key ~ '_ci95'][1] | percent }}; {% endif %}chance {{ metrics[key ~ '_chance'] | percent }}</small>
</div>
{%- endmacro %}
{% macro picture(url, text) -%}
<div class="picture"><img src="{{ url }}" alt="{{ text }}" loading="lazy"></div>
{%- endmacro %}
{% macro mapping(rows) -%}
<div class="scroll"><table><tbody>
{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</tbody></table></div>
{%- endmacro %}
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="generator" content="mmbase {{ facts.version }}">
<link rel="icon" href="data:,">
<title>{{ facts.name }}: run report</title>
<style>{{ style }}</style>
</head>
<body>
<main class="page">
<header>
  <p class="eyebrow">mmbase run report</p>
  <h1>{{ facts.name }}</h1>
  <dl class="facts">
  {% for name, value in header %}<div><dt>{{ name }}</dt><dd>{{ value }}</dd></div>
  {% endfor %}</dl>
  <nav aria-label="Sections">
    <a href="#results">Results</a>
    {% if curves %}<a href="#training">Training</a>{% endif %}
    {% if tasks | selectattr("right_or_wrong") | list %}<a href="#predictions">Predictions</a>{% endif %}
    {% if tasks | selectattr("examples") | list %}<a href="#retrieval">Retrieval</a>{% endif %}
    {% if tasks | selectattr("breakdown") | list %}<a href="#breakdown">Breakdown</a>{% endif %}
    <a href="#size">Speed and size</a>
    {% if sources %}<a href="#data">Data and licences</a>{% endif %}
    <a href="#configuration">Configuration</a>
  </nav>
</header>

<section id="results">
<h2>Results</h2>
<p class="lead">Zero-shot: each picture is matched against the names of all classes. The red mark on a bar is what
guessing would reach.</p>
<div class="scores">
{% for task in tasks %}
<article class="card">
  <h3>{{ task.title }}</h3>
  {% if task.description %}<p class="about">{{ task.description }}</p>{% endif %}
  {% if task.zero_shot %}
  {{ meter(task.zero_shot, "top1", true) }}
  {{ meter(task.zero_shot, "top5") }}
  {% set z = task.zero_shot %}
  <div class="measure"><small>{{ z.samples | count }} pictures, {{ z.classes | count }} labels,
    mean recall per class {{ z.mean_per_class_recall | percent }}{% if z.not_finite %};
    <span class="wrong">{{ z.not_finite | count }} pictures had NaN scores and count as wrong</span>{% endif %}
  </small></div>
  {% elif task.retrieval %}
  {{ meter(task.retrieval.text_to_image, "recall@1", true) }}
  {{ meter(task.retrieval.text_to_image, "recall@5") }}
  <div class="measure"><small>text to image, {{ task.retrieval.text_to_image.queries | count }} texts,
    {{ task.retrieval.text_to_image.candidates | count }} pictures</small></div>
  {% endif %}
</article>
{% endfor %}
</div>
<div class="tiles">
{% for name, value in tiles %}<div><b>{{ value }}</b><span>{{ name }}</span></div>
{% endfor %}</div>
{% if tasks | selectattr("retrieval") | list %}
<h3>Retrieval between pictures and captions</h3>
<div class="scroll"><table>
<thead><tr><th>Task</th><th>Direction</th><th class="number">Recall@1</th><th class="number">Recall@5</th>
<th class="number">Recall@10</th><th class="number">Chance @1</th><th class="number">Median rank</th>
<th class="number">Queries</th><th class="number">Candidates</th></tr></thead><tbody>
{% for task in tasks if task.retrieval %}{% for key, name in directions %}{% set m = task.retrieval[key] %}
<tr>{% if loop.first %}<th scope="rowgroup" rowspan="2">{{ task.title }}</th>{% endif %}
<td class="tight">{{ name }}</td>
<td class="number">{{ m["recall@1"] | percent }}</td><td class="number">{{ m["recall@5"] | percent }}</td>
<td class="number">{{ m["recall@10"] | percent }}</td><td class="number">{{ m["recall@1_chance"] | percent }}</td>
<td class="number">{{ "%g" % m.median_rank }}</td><td class="number">{{ m.queries | count }}</td>
<td class="number">{{ m.candidates | count }}</td></tr>
{% endfor %}{% endfor %}</tbody></table></div>
{% endif %}
</section>

{% if curves %}
<section id="training">
<h2>Training</h2>
<div class="charts">
{% for curve in curves %}
<figure class="card chart">
  <figcaption>{{ curve.title }}<span>{{ curve.summary }}</span></figcaption>
  <div class="plot">
    <svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{{ curve.title }} over training">
      {% for at, _ in curve.y_ticks %}<path class="grid" d="M0 {{ at * 10 }}H1000"/>{% endfor %}
      {% if curve.raw %}<path class="raw" d="{{ curve.raw }}"/>{% endif %}
      <path class="main" d="{{ curve.line }}"/>
    </svg>
    {% for at, label in curve.y_ticks %}<em class="y" style="top: {{ at }}%">{{ label }}</em>{% endfor %}
    {% for at, label in curve.x_ticks %}<em class="x" style="left: {{ at }}%">{{ label }}</em>{% endfor %}
  </div>
  <p class="axis">{{ curve.x_title }}</p>
</figure>
{% endfor %}
</div>
</section>
{% endif %}

{% if tasks | selectattr("right_or_wrong") | list %}
<section id="predictions">
<h2>Predictions</h2>
<p class="lead">The likeliest label with its probability among all labels of the task.</p>
{% for task in tasks if task.right_or_wrong %}
<h3>{{ task.title }}</h3>
{% for heading, tiles in task.right_or_wrong if tiles %}
<h4>{{ heading }}</h4>
<div class="sheet">
{% for tile in tiles %}<div class="tile" title="{{ tile.ranking }}">{{ picture(tile.url, tile.label) }}
<p class="caption"><b class="{{ 'right' if tile.is_right else 'wrong' }}">{{ '✓' if tile.is_right else '✗' }}
{{ tile.said }}</b> {{ tile.probability | percent0 }}
{% if not tile.is_right %}<span>true: {{ tile.label }}</span>{% endif %}</p></div>
{% endfor %}</div>
{% endfor %}{% endfor %}
</section>
{% endif %}

{% if tasks | selectattr("examples") | list %}
<section id="retrieval">
<h2>Retrieval</h2>
<p class="lead">Random queries and the five nearest by cosine similarity. Right ones are framed and ticked.</p>
{% for task in tasks if task.examples %}
<h3>{{ task.title }}</h3>
<h4>Text to pictures</h4>
<div class="queries">
{% for query in task.examples.text_to_image %}<div class="query"><p>{{ query.text }}</p><div class="row">
{% for hit in query.matches %}<div class="hit{{ ' yes' if hit.right }}" title="{{ hit.text }}">
{{ picture(hit.url, hit.text) }} {{ '✓ ' if hit.right }}{{ "%.2f" % hit.cosine }}</div>
{% endfor %}</div></div>
{% endfor %}</div>
<h4>Picture to texts</h4>
<div class="queries">
{% for query in task.examples.image_to_text %}<div class="query pair">{{ picture(query.url, query.text) }}<ol>
{% for hit in query.matches %}<li class="{{ 'yes' if hit.right }}"><span>{{ '✓ ' if hit.right }}{{ hit.text }}</span>
{{ "%.2f" % hit.cosine }}</li>
{% endfor %}</ol></div>
{% endfor %}</div>
{% endfor %}
</section>
{% endif %}

{% if tasks | selectattr("breakdown") | list %}
<section id="breakdown">
<h2>Breakdown</h2>
{% for task in tasks if task.breakdown %}{% for field, values in task.breakdown.items() %}
<h3>{{ task.title }}, by {{ field }}</h3>
<div class="scroll"><table>
<thead><tr><th>{{ field }}</th><th class="number">Pictures</th><th>Top-1</th><th>Top-5</th></tr></thead><tbody>
{% for value, m in (values.items() | list)[:40] %}
<tr><th scope="row">{{ value }}</th><td class="number">{{ m.samples | count }}</td>
<td class="bar">{{ m.top1 | percent }}<i style="--share: {{ m.top1 | share }}"></i></td>
<td class="bar">{{ m.top5 | percent }}<i style="--share: {{ m.top5 | share }}"></i></td></tr>
{% endfor %}</tbody></table></div>
{% if values | length > 40 %}<p class="lead">{{ values | length - 40 }} more are in metrics.json.</p>{% endif %}
{% endfor %}{% endfor %}
</section>
{% endif %}

<section id="size">
<h2>Speed and size</h2>
{% if latency %}
<p class="lead">Median of {{ latency.calls }} calls after warm-up, on {{ latency.device }} with {{ latency.threads }}
{{ "thread" if latency.threads == 1 else "threads" }}; images at {{ latency.image_size }} pixels, decoding and
preprocessing included.</p>
<div class="scroll"><table><thead><tr><th>What</th><th class="number">Median</th>
<th class="number">10th to 90th percentile</th><th class="number">Per item</th></tr></thead><tbody>
{% for name, t in latency.timings %}<tr><th scope="row">{{ name }}</th><td class="number">{{ t.median_ms | ms }}</td>
<td class="number">{{ t.p10_ms | ms }} to {{ t.p90_ms | ms }}</td><td class="number">{{ t.per_item_ms | ms }}</td></tr>
{% endfor %}</tbody></table></div>
{% endif %}
{{ mapping(size) }}
</section>

{% if sources %}
<section id="data">
<h2>Data and licences</h2>
<div class="scroll"><table><thead><tr>
{% for column in source_columns %}<th>{{ column | capitalize }}</th>{% endfor %}
</tr></thead><tbody>
{% for source in sources %}<tr>
{% for value in source %}
<td>{% if value | is_link %}<a href="{{ value }}">{{ value }}</a>{% else %}{{ value }}{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody></table></div>
</section>
{% endif %}

<section id="configuration">
<h2>Configuration and environment</h2>
{% if config %}
<details><summary>Configuration ({{ facts.config_hash }})</summary><pre>{{ config }}</pre></details>
{% endif %}
<details><summary>Environment</summary>{{ mapping(environment) }}</details>
{% for task in tasks if task.templates %}
<details><summary>Prompt templates of {{ task.title }} ({{ task.templates | length }})</summary><pre>
{% for template in task.templates %}{{ template }}
{% endfor %}</pre></details>{% endfor %}
</section>
<footer>Written by mmbase {{ facts.version }}, {{ facts.date }}. One file, nothing loaded from elsewhere.</footer>
</main>
</body>
</html>
"""
