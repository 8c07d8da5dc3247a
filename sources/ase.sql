-- CDC Adult Sepsis Event (Hospital Toolkit for Adult Sepsis Surveillance, 2018; Rhee et al., JAMA 2017;318:1241,
-- doi 10.1001/jama.2017.13836), by calendar day. It looks days ahead: it is for labels, not for the bedside.
-- Reads: judged_visits, antibiotics, cultures, vasopressors, ventilation, measurements; variable `lactate`.
-- Makes: adult_sepsis_events (one row for each septic visit: its first event), first_infections (one for each visit
-- with a presumed infection).
--
--   A  a blood culture, and 4 qualifying antimicrobial days that start within 2 days of it
--   B  a failing organ within 2 days of the culture

-- A row without a visit belongs to the one in whose days it falls; two days before it count too (emergency department).
CREATE OR REPLACE MACRO in_visit(visit_id, day, v) AS
    coalesce(visit_id = v.visit_id, day BETWEEN v.first_day - 2 AND coalesce(v.last_day, day));

-- ------------------------------------------------------------------------------- qualifying antimicrobial days
-- What was given; for a visit without a record of that, the days from the start to the end of each order, or the first
-- one where no end is known.
-- Vancomycin by mouth is another drug than vancomycin into a vein. An unknown route counts as parenteral.

CREATE OR REPLACE TABLE antimicrobial_days AS
WITH doses AS (
    SELECT v.visit_id, v.last_day, a.start, a.stop, coalesce(a.administered, false) AS administered,
           coalesce(is_parenteral(a.route), a.route IS NULL) AS parenteral,
           CASE WHEN d.substance = 'vancomycin' AND NOT parenteral THEN 'vancomycin by mouth' ELSE d.substance END AS drug,
           bool_or(coalesce(a.administered, false)) OVER (PARTITION BY v.visit_id) AS has_administrations
    FROM antibiotics a
    JOIN drugs d ON d.name = a.name AND d.substance IS NOT NULL
    JOIN judged_visits v ON v.client = a.client AND in_visit(a.visit_id, a.start::DATE, v)
    WHERE a.start IS NOT NULL AND NOT is_topical(a.name, a.route)
),
days AS (
    SELECT visit_id, drug, parenteral, start, administered,
           unnest(generate_series(start::DATE, CASE WHEN administered OR stop IS NULL THEN start::DATE
                  ELSE greatest(start::DATE, least(stop::DATE, last_day, start::DATE + 365)) END,
                  INTERVAL 1 DAY))::DATE AS day
    FROM doses WHERE administered = has_administrations
)
SELECT visit_id, drug, day, bool_or(parenteral) AS parenteral, min(greatest(start, day::TIMESTAMP)) AS time,
       bool_and(administered) AS administered
FROM days GROUP BY ALL;

-- A run of one drug: no more than one day without it. Its first day is a new antimicrobial: none in the 2 days before.
CREATE OR REPLACE TABLE antimicrobial_runs AS
WITH marked AS (
    SELECT *, day - lag(day) OVER run > 2 IS NOT false AS is_first FROM antimicrobial_days
    WINDOW run AS (PARTITION BY visit_id, drug ORDER BY day)
),
numbered AS (
    SELECT *, sum(is_first::INTEGER) OVER (PARTITION BY visit_id, drug ORDER BY day) AS run FROM marked
)
SELECT visit_id, drug, run, min(day) AS first_day, max(day) AS last_day,
       arg_min(parenteral, day) AS parenteral, min(time) AS time
FROM numbered GROUP BY ALL;

-- Courses: the days without a gap from the first day of a new parenteral antimicrobial, by drugs that are new on it or
-- later. A day between two doses of one drug counts.
CREATE OR REPLACE TABLE antimicrobial_courses AS
WITH starts AS (
    SELECT visit_id, first_day AS course_start, min(time) AS time
    FROM antimicrobial_runs WHERE parenteral GROUP BY ALL
),
covered AS (
    SELECT DISTINCT s.visit_id, s.course_start, s.time,
           unnest(generate_series(r.first_day, r.last_day, INTERVAL 1 DAY))::DATE AS day
    FROM starts s JOIN antimicrobial_runs r ON r.visit_id = s.visit_id AND r.first_day >= s.course_start
),
counted AS (
    SELECT *, row_number() OVER (PARTITION BY visit_id, course_start ORDER BY day) - 1 = day - course_start AS no_gap
    FROM covered
)
SELECT visit_id, course_start, time, count(*) AS days FROM counted WHERE no_gap GROUP BY ALL;

-- ------------------------------------------------------------------------------------------ presumed infections
-- Fewer than 4 days do if the patient died, or left for a hospice or another hospital, on the course's last day or the
-- day after it.

CREATE OR REPLACE TABLE presumed_infections AS
SELECT v.visit_id, v.client, v.first_day, v.esrd, c.time AS culture_time, c.time::DATE AS culture_day,
       a.course_start, a.time AS antibiotic_time, a.days AS qualifying_days,
       least(c.time::DATE, a.course_start) - v.first_day < 2 AS community_onset
FROM judged_visits v
JOIN cultures c ON c.client = v.client AND c.blood AND in_visit(c.visit_id, c.time::DATE, v)
JOIN antimicrobial_courses a ON a.visit_id = v.visit_id AND a.course_start BETWEEN c.time::DATE - 2 AND c.time::DATE + 2
WHERE a.days >= 4 OR v.ended_early AND a.course_start + a.days::INTEGER >= v.last_day;

-- also for the visits in which no organ failed
CREATE OR REPLACE TABLE first_infections AS
SELECT *, least(culture_time, antibiotic_time) AS suspicion_time FROM presumed_infections
QUALIFY row_number() OVER (PARTITION BY visit_id ORDER BY suspicion_time, culture_time, course_start) = 1;

-- ---------------------------------------------------------------------------------------------- failing organs
-- A vasopressor or a ventilator is new if the patient was without it all the day before.

CREATE OR REPLACE TABLE organ_support AS
WITH used AS (
    SELECT v.visit_id, 'cardiovascular' AS organ, p.drug, p.start, coalesce(p.stop, p.start) AS stop
    FROM vasopressors p JOIN judged_visits v ON v.client = p.client AND in_visit(p.visit_id, p.start::DATE, v)
    WHERE p.drug <> 'dobutamine'
    UNION ALL
    SELECT v.visit_id, 'respiratory', 'ventilator', p.start, coalesce(p.stop, p.start)
    FROM ventilation p JOIN judged_visits v ON v.client = p.client AND in_visit(p.visit_id, p.start::DATE, v)
)
SELECT u.visit_id, u.organ, u.start AS time FROM used u
WHERE NOT EXISTS (
    FROM used o WHERE o.visit_id = u.visit_id AND o.drug = u.drug
    AND o.start::DATE < u.start::DATE AND o.stop::DATE >= u.start::DATE - 1
);

-- The baseline is the best value of the visit, or that of the 5 days around the culture if the infection began after
-- the visit's second day.
CREATE OR REPLACE TABLE failing_organs AS
WITH labs AS (
    SELECT v.visit_id, m.concept, m.time, m.value
    FROM measurements m JOIN judged_visits v ON v.client = m.client AND in_visit(m.visit_id, m.time::DATE, v)
    WHERE m.concept IN ('creatinine', 'bilirubin_total', 'platelets', 'lactate')
),
with_baseline AS (
    SELECT i.visit_id, i.culture_time, i.course_start, i.esrd, l.concept, l.time, l.value,
           l.time::DATE BETWEEN i.culture_day - 2 AND i.culture_day + 2 AS is_near,
           min(l.value) FILTER (i.community_onset OR is_near) OVER same AS lowest,
           max(l.value) FILTER (i.community_onset OR is_near) OVER same AS highest
    FROM presumed_infections i JOIN labs l USING (visit_id)
    WINDOW same AS (PARTITION BY i.visit_id, i.culture_time, i.course_start, l.concept)
)
SELECT visit_id, culture_time, course_start, time,
       CASE concept WHEN 'creatinine' THEN 'renal' WHEN 'bilirubin_total' THEN 'liver'
                    WHEN 'platelets' THEN 'coagulation' ELSE 'lactate' END AS organ
FROM with_baseline
WHERE is_near AND CASE concept
    WHEN 'creatinine' THEN value >= 2 * lowest AND NOT coalesce(esrd, false)
    WHEN 'bilirubin_total' THEN value >= 2.0 AND value >= 2 * lowest
    WHEN 'platelets' THEN value < 100 AND highest >= 100 AND value <= highest / 2
    WHEN 'lactate' THEN value >= 2.0 AND getvariable('lactate') END
UNION ALL
SELECT i.visit_id, i.culture_time, i.course_start, s.time, s.organ
FROM presumed_infections i JOIN organ_support s
  ON s.visit_id = i.visit_id AND s.time::DATE BETWEEN i.culture_day - 2 AND i.culture_day + 2;

CREATE OR REPLACE TABLE adult_sepsis_events AS
WITH events AS (
    SELECT i.visit_id, i.culture_time, i.course_start, any_value(i.antibiotic_time) AS antibiotic_time,
           any_value(i.qualifying_days) AS qualifying_days, any_value(i.community_onset) AS community_onset,
           min(f.time) AS dysfunction_time,
           bool_or(f.organ = 'cardiovascular') AS cardiovascular, bool_or(f.organ = 'respiratory') AS respiratory,
           bool_or(f.organ = 'renal') AS renal, bool_or(f.organ = 'liver') AS liver,
           bool_or(f.organ = 'coagulation') AS coagulation, bool_or(f.organ = 'lactate') AS lactate
    FROM presumed_infections i JOIN failing_organs f USING (visit_id, culture_time, course_start)
    GROUP BY i.visit_id, i.culture_time, i.course_start
)
SELECT *, least(culture_time, antibiotic_time) AS suspicion_time FROM events
QUALIFY row_number() OVER (
    PARTITION BY visit_id
    ORDER BY least(culture_time, antibiotic_time, dysfunction_time)::DATE, culture_time, course_start) = 1;
